"""DAFT, block-wise fine-tuning and their baselines on real images: `python tests/benchmarks/strategies.py`.

Each strategy gets the same tuning budget: the same number of trials (seed 0) of its learning rates, drawn log-uniformly
from the same ranges and evaluated on validation; the best setting then runs with each seed, and the test split is used
once per seed. All train with SGD (momentum 0.9, cosine, no clipping, no augmentation), with the best epoch by
validation. Every run is a line of the results file; runs that are already there are not repeated.

Tasks: ELPV at 64 px, with 500 monocrystalline cells for training, and polycrystalline ones as out-of-distribution data;
MNIST with 200 images, and UCI digits as out-of-distribution data. Scores are balanced accuracies.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import PIXELS, Runs, quiet, ready, train, tune
from datasets import Dataset, DatasetDict

from hf_ft import BlockwiseConfig, DAFTConfig, FullConfig, LinearProbeConfig, LPFTConfig
from hf_ft.core.config import FTConfig
from hf_ft.splits import stratified_split
from hf_ft.zoo.datasets import elpv, mnist5k, uci_digits
from hf_ft.zoo.models import load_model

RESULTS = Path(__file__).parent / "results" / "strategies.jsonl"
MODEL = "mobilenet_v2"
EPOCHS = {"elpv": 8, "mnist": 15}
BACKBONE, HEAD = (1e-4, 1e-1), (1e-2, 3.0)  # the ranges of the learning rates


def strategies(head_lr: float) -> dict[str, FTConfig]:
    """The rows of the table; those without their own head rate ignore it."""
    search: dict[str, Any] = {
        "search_epochs": 4,
        "metric": "balanced_accuracy",
        "storage": "memory",
        "baselines": False,
    }
    return {
        "full": FullConfig(),
        "linear_probe (head only)": LinearProbeConfig(),
        "lp_ft": LPFTConfig(head_lr=head_lr),
        "daft": DAFTConfig(head_lr=head_lr),
        "daft, no conversion": DAFTConfig(head_lr=head_lr, convert_batch_norm=False),
        "daft, equal rates": DAFTConfig(head_lr=None),
        "daft, head not zeroed": DAFTConfig(head_lr=head_lr, zero_head=False),
        "blockwise, auto": BlockwiseConfig(**search),
        "blockwise, last quarter": BlockwiseConfig(block="last_quarter"),
        "blockwise, all": BlockwiseConfig(block="all"),
    }


def task(name: str) -> dict[str, Dataset]:
    """Splits ``train``, ``validation``, ``test`` and ``ood``."""
    if name == "elpv":
        cells = elpv()
        types = np.asarray(cells["cell_type"][:])
        splits = stratified_split(cells.select(np.flatnonzero(types == "mono")), 500, 250)
        return {**splits, "ood": cells.select(np.flatnonzero(types == "poly"))}
    splits: DatasetDict = stratified_split(mnist5k(), 200, 200, 1000)
    return {**splits, "ood": uci_digits()}


class Task:
    """A task with its prepared images."""

    def __init__(self, name: str) -> None:
        self.name = name
        splits = task(name)
        self.labels = splits["train"].features["label"].names
        self.data = ready(splits, self.model(0)[1])

    def model(self, seed: int) -> Any:
        return load_model(MODEL, id2label=dict(enumerate(self.labels)), image_size=PIXELS, seed=seed)

    def train(self, config: FTConfig, learning_rate: float, seed: int, final: bool) -> dict[str, Any]:
        """Run once: the best epoch's validation score; with ``final``, also test and out-of-distribution scores."""
        trainer, found = train(
            self.model(seed)[0],
            config,
            self.data,
            epochs=EPOCHS[self.name],
            batch_size=32,
            learning_rate=learning_rate,
            seed=seed,
            tests=("test", "ood") if final else (),
        )
        if isinstance(config, BlockwiseConfig):
            assert trainer._run is not None
            state = trainer._run.states.get("blockwise")
            found["block"] = trainer._run.plan.stages[0].name
            found["search"] = state.info.get("scores") if state is not None else None
        return found


def run(runs: Runs, task: Task, name: str, rates: dict[str, float], seed: int, final: bool) -> dict[str, Any]:
    entry = {"task": task.name, "strategy": name, **rates, "seed": seed, "final": final}
    config = strategies(rates["head_lr"])[name]
    return runs.get(entry, lambda: task.train(config, rates["learning_rate"], seed, final))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="mnist,elpv")
    parser.add_argument("--strategies", default="", help="only those whose name contains this")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet()
    runs = Runs(options.results, ("task", "strategy", "learning_rate", "head_lr", "seed", "final"))
    space = {"learning_rate": BACKBONE, "head_lr": HEAD}
    for name in options.tasks.split(","):
        made = Task(name)
        for strategy in (strategy for strategy in strategies(0.1) if options.strategies in strategy):

            def score(rates: dict[str, float], made: Task = made, strategy: str = strategy) -> float:
                return run(runs, made, strategy, rates, 0, final=False)["validation"]

            best = tune(score, space, options.trials)
            for seed in range(options.seeds):
                run(runs, made, strategy, best, seed, final=True)


if __name__ == "__main__":
    main()
