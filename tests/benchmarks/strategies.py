"""DAFT, block-wise fine-tuning and their baselines on real images: `python tests/benchmarks/strategies.py`.

Each strategy gets the same tuning budget: so many trials (seed 0) of its learning rates, drawn log-uniformly over
the same ranges, judged on validation; then the best setting runs with each seed, and the test split is looked at
once for each. All train with SGD (momentum 0.9, cosine, no clipping, no augmentation), with the best epoch by
validation. Every run is a line of the results file; a run that is there is not made again.

Tasks: ELPV at 64 px, 500 monocrystalline cells to train on, with polycrystalline ones as the data out of distribution;
MNIST, 200 images, with UCI digits out of distribution. Scores are balanced accuracies.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import transformers
from datasets import Dataset, DatasetDict
from transformers import PrinterCallback, TrainingArguments

from hf_ft import BlockwiseConfig, DAFTConfig, FTTrainer, FullConfig, LinearProbeConfig, LPFTConfig
from hf_ft.cli.demo_data import Cells, channels_last
from hf_ft.config import FTConfig
from hf_ft.metrics import classification_metrics
from hf_ft.zoo import elpv, load_model, mnist5k, stratified_split, uci_digits

RESULTS = Path(__file__).parent / "results" / "strategies.jsonl"
PIXELS, MODEL = 64, "mobilenet_v2"
EPOCHS = {"elpv": 8, "mnist": 15}
BACKBONE, HEAD = (1e-4, 1e-1), (1e-2, 3.0)  # the ranges of the learning rates


def strategies(head_lr: float) -> dict[str, FTConfig]:
    """The rows of the table; those without a head rate of their own leave it out."""
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
    """Images of a task, resized and processed once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.splits = task(name)
        self.labels = self.splits["train"].features["label"].names
        processor = self.model(0)[1]
        self.ready = {key: Cells(split, processor, PIXELS, keep=True) for key, split in self.splits.items()}

    def model(self, seed: int) -> Any:
        return load_model(MODEL, id2label=dict(enumerate(self.labels)), image_size=PIXELS, seed=seed)

    def train(self, config: FTConfig, learning_rate: float, seed: int, final: bool) -> dict[str, Any]:
        """One run: validation score of the best epoch; with ``final``, the scores on test and out of distribution."""
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                num_train_epochs=EPOCHS[self.name],
                per_device_train_batch_size=32,
                per_device_eval_batch_size=64,
                optim="sgd",
                optim_args="momentum=0.9",
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                weight_decay=0.0,
                max_grad_norm=0.0,
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                save_only_model=True,
                load_best_model_at_end=True,
                metric_for_best_model="balanced_accuracy",
                logging_strategy="epoch",
                report_to="none",
                log_level="error",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                remove_unused_columns=False,
                seed=seed,
            )
            trainer = FTTrainer(
                self.model(seed)[0],
                args,
                strategy=config,
                train_dataset=self.ready["train"],
                eval_dataset=self.ready["validation"],
                data_collator=channels_last,
                compute_metrics=classification_metrics,
            )
            trainer.remove_callback(PrinterCallback)
            started = time.perf_counter()
            trainer.train()
            found = {"seconds": time.perf_counter() - started, "validation": trainer.state.best_metric}
            if isinstance(config, BlockwiseConfig):
                assert trainer._run is not None
                state = trainer._run.states.get("blockwise")
                found["block"] = trainer._run.plan.stages[0].name
                found["search"] = state.info.get("scores") if state is not None else None
            if final:
                for split in ("test", "ood"):
                    metrics = trainer.predict(self.ready[split]).metrics or {}
                    found[split] = metrics["test_balanced_accuracy"]
            return found


class Runs:
    """The results file: a line for each run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.found = {self._key(entry): entry for entry in map(json.loads, lines)}

    @staticmethod
    def _key(entry: dict[str, Any]) -> str:
        names = ("task", "strategy", "learning_rate", "head_lr", "seed", "final")
        return json.dumps([entry[name] for name in names])

    def get(self, task: Task, name: str, rates: dict[str, float], seed: int, final: bool) -> dict[str, Any]:
        entry = {"task": task.name, "strategy": name, **rates, "seed": seed, "final": final}
        key = self._key(entry)
        if key not in self.found:
            config = strategies(rates["head_lr"])[name]
            entry |= task.train(config, rates["learning_rate"], seed, final)
            entry |= {"torch": torch.__version__, "transformers": transformers.__version__}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry) + "\n")
            self.found[key] = entry
            scores = ", ".join(f"{k} {entry[k]:.3f}" for k in ("validation", "test", "ood") if k in entry)
            print(f"{task.name:6s}{name:26s}{rates} seed {seed}: {scores}, {entry['seconds']:.0f} s", flush=True)
        return self.found[key]


def tune(runs: Runs, task: Task, name: str, trials: int) -> dict[str, float]:
    """The rates that are best on validation, of the same number of draws for every strategy."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.QMCSampler(scramble=True, seed=0))

    def objective(trial: optuna.Trial) -> float:
        rates = {
            "learning_rate": trial.suggest_float("learning_rate", *BACKBONE, log=True),
            "head_lr": trial.suggest_float("head_lr", *HEAD, log=True),
        }
        return runs.get(task, name, rates, 0, final=False)["validation"]

    study.optimize(objective, n_trials=trials)
    return study.best_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="mnist,elpv")
    parser.add_argument("--strategies", default="", help="those whose name holds this")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runs = Runs(options.results)
    for name in options.tasks.split(","):
        made = Task(name)
        for strategy in (strategy for strategy in strategies(0.1) if options.strategies in strategy):
            best = tune(runs, made, strategy, options.trials)
            for seed in range(options.seeds):
                runs.get(made, strategy, best, seed, final=True)


if __name__ == "__main__":
    main()
