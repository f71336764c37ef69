"""TRED and the regularisers it is compared with, on real images: `python tests/benchmarks/regularisers.py`.

Each strategy gets the same tuning budget: the same number of trials (seed 0) of its learning rate and of its own
weight, drawn log-uniformly and evaluated on validation. The best setting then runs with each seed, which draws its own
training images, head and order, and the test split is used once per seed. All train with SGD (momentum 0.9, cosine, no
clipping, no augmentation), with the best epoch by validation. Every run is a line of the results file; runs that are
already there are not repeated. What a strategy measures before training is measured once per draw.

Tasks, all at 64 px with an ImageNet MobileNetV2. Far: ELPV with 100 and 500 cells. Near: the network is first trained
on MNIST digits 0 to 4 and then on 5, 10 and 20 images of each of the digits 5 to 9; or first on all monocrystalline
cells of ELPV and then on 50 and 200 polycrystalline ones. Scores are balanced accuracies.

On some tasks TRED is also tried with weaker weights, and the runs are repeated with BatchNorm in eval mode, on both
sides of the comparison: in train mode, the network computes a different function than the reference from the start,
which terms that compare features see.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from common import PIXELS, Runs, cells, digits, quiet, ready, train, tune
from transformers import AutoModelForImageClassification

from hf_ft import (
    AttentionTransferConfig,
    BSSConfig,
    DELTAConfig,
    FullConfig,
    L2SPConfig,
    LinearProbeConfig,
    TREDConfig,
)
from hf_ft.core.config import FTConfig
from hf_ft.core.context import State
from hf_ft.splits import stratified_split
from hf_ft.zoo.datasets import mnist5k
from hf_ft.zoo.models import load_model

RESULTS = Path(__file__).parent / "results" / "regularisers.jsonl"
MODEL = "mobilenet_v2"
RATE = (3e-4, 1e-1)
TEST = 1000
# task -> training images, validation images, epochs, batch size
TASKS = {
    "digits_5": (25, 50, 20, 16),
    "digits_10": (50, 50, 20, 16),
    "digits_20": (100, 100, 12, 32),
    "poly_50": (50, 50, 20, 16),
    "poly_200": (200, 200, 12, 32),
    "elpv_100": (100, 100, 12, 32),
    "elpv_500": (500, 250, 8, 32),
}
Make = Callable[[float], FTConfig]
STILL = ("digits_10", "poly_50", "elpv_100")  # tasks on which BatchNorm in eval mode is also tried
EVAL = "BatchNorm in eval mode: "


def _tred(criterion: Literal["max_mmd", "min_mi", "both", "none"], **options: Any) -> Make:
    return lambda alpha: TREDConfig(criterion=criterion, alpha=alpha, **options)


# strategy -> the config for a weight, and the weight's range
STRATEGIES: dict[str, tuple[Make, tuple[float, float]]] = {
    "full": (lambda _: FullConfig(), (1.0, 10.0)),  # its trials vary only the rate
    "linear_probe": (lambda _: LinearProbeConfig(), (1.0, 10.0)),  # how far the frozen features go
    "l2_sp": (lambda alpha: L2SPConfig(alpha=alpha), (1e-3, 1.0)),
    "attention_transfer": (lambda beta: AttentionTransferConfig(beta=beta), (10.0, 1e4)),
    "delta": (lambda alpha: DELTAConfig(alpha=alpha), (1e-3, 1.0)),
    "delta, uniform": (lambda alpha: DELTAConfig(alpha=alpha, weights="uniform"), (1e-3, 1.0)),
    "bss": (lambda eta: BSSConfig(eta=eta), (1e-4, 1e-1)),
    "tred, none": (_tred("none"), (1e-3, 1e-1)),
    "tred, max_mmd": (_tred("max_mmd"), (1e-3, 1e-1)),
    "tred, min_mi": (_tred("min_mi"), (1e-3, 1e-1)),
    "tred, both": (_tred("both"), (1e-3, 1e-1)),
    "tred, both, no bottleneck": (_tred("both", bottleneck=0.0), (1e-3, 1e-1)),
}
# Below the paper's range: its sum over channels has a different scale in every network.
WEAK = {"tred, both, weaker": (_tred("both"), (1e-5, 1e-3))}


STILL_STRATEGIES = ("full", "l2_sp", "delta, uniform", "tred, none", "tred, max_mmd", "tred, both")


def config(strategy: str, weight: float) -> FTConfig:
    made = (STRATEGIES | WEAK)[strategy.removeprefix(EVAL)][0](weight)
    return replace(made, norm_mode="eval") if strategy.startswith(EVAL) else made


def strategies_of(task: str) -> list[str]:
    if task not in STILL:
        return list(STRATEGIES)
    return [*STRATEGIES, *WEAK, *(EVAL + name for name in (*STILL_STRATEGIES, *WEAK))]


def source_model(task: str, folder: Path) -> str | None:
    """The folder of the network first trained on the task's source; None for ImageNet's. Trained if missing."""
    name = {"digits": "digits_0_4", "poly": "mono"}.get(task.split("_")[0])
    if name is None:
        return None
    if not (folder / name / "config.json").is_file():
        data = digits(mnist5k(), 0, 4) if name == "digits_0_4" else cells("mono")
        rows = len(data) // 5
        splits = stratified_split(data, len(data) - rows, rows, 0)
        labels = splits["train"].features["label"].names
        model, processor = load_model(MODEL, id2label=dict(enumerate(labels)), image_size=PIXELS)
        images = ready({key: splits[key] for key in ("train", "validation")}, processor)
        trainer, found = train(model, FullConfig(), images, epochs=12, batch_size=32, learning_rate=1e-2, seed=0)
        print(f"{name}: validation {found['validation']:.3f}, {found['seconds']:.0f} s", flush=True)
        trainer.model.save_pretrained(folder / name)
    return str(folder / name)


class Task:
    """A task: its images for each seed, its network, and the measurements on them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.train_images, self.validation_images, self.epochs, self.batch_size = TASKS[name]
        kind = name.split("_")[0]
        self.dataset = digits(mnist5k(), 5, 9) if kind == "digits" else cells("poly" if kind == "poly" else None)
        self.source = source_model(name, folder)
        self.labels = self.dataset.features["label"].names
        self._data: dict[int, Any] = {}
        self._states: dict[tuple[Any, ...], dict[str, State]] = {}

    def model(self, seed: int) -> Any:
        model, processor = load_model(MODEL, id2label=dict(enumerate(self.labels)), image_size=PIXELS, seed=seed)
        if self.source is not None:  # its backbone, with the new head
            first = AutoModelForImageClassification.from_pretrained(self.source)
            model.mobilenet_v2.load_state_dict(first.mobilenet_v2.state_dict())
        return model, processor

    def data(self, seed: int) -> Any:
        if seed not in self._data:
            splits = stratified_split(self.dataset, self.train_images, self.validation_images, TEST, seed=seed)
            self._data = {seed: ready(splits, self.model(0)[1])}
        return self._data[seed]

    def run(self, runs: Runs, strategy: str, rates: dict[str, float], seed: int, final: bool) -> dict[str, Any]:
        entry = {"task": self.name, "strategy": strategy, **rates, "seed": seed, "final": final}

        def make() -> dict[str, Any]:
            key = (strategy, seed)
            trainer, found = train(
                self.model(seed)[0],
                config(strategy, rates["weight"]),
                self.data(seed),
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=rates["learning_rate"],
                seed=seed,
                tests=("test",) if final else (),
                states=self._states.get(key),
            )
            self._states = {key: dict(trainer.states)}
            info = trainer.states["tred"].info if "tred" in trainer.states else {}
            if "figures" in info:
                found |= {"disentangled": info["figures"], "verdict": info["verdict"]}
            return found

        return runs.get(entry, make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--strategies", default="", help="only names that begin with one of these, separated by commas")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sources", type=Path, default=Path("runs/benchmarks"), help="folder of the source networks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()
    runs = Runs(options.results, ("task", "strategy", "learning_rate", "weight", "seed", "final"))
    for name in options.tasks.split(","):
        task = Task(name, options.sources)
        for strategy in strategies_of(name):
            if not strategy.startswith(tuple(options.strategies.split(","))):
                continue

            def score(rates: dict[str, float], task: Task = task, strategy: str = strategy) -> float:
                return task.run(runs, strategy, rates, 0, final=False)["validation"]

            weights = (STRATEGIES | WEAK)[strategy.removeprefix(EVAL)][1]
            best = tune(score, {"learning_rate": RATE, "weight": weights}, options.trials)
            for seed in range(options.seeds):
                task.run(runs, strategy, best, seed, final=True)


if __name__ == "__main__":
    main()
