"""What the comparisons of strategies share: prepared images, a run, a file of runs, and equal tuning budgets."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import transformers
from cells import Cells, channels_last
from datasets import ClassLabel, Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from hf_ft import FTTrainer
from hf_ft.core.config import FTConfig
from hf_ft.core.context import State
from hf_ft.metrics import classification_metrics
from hf_ft.zoo.datasets import elpv

PIXELS = 64
Entry = dict[str, Any]


def ready(splits: Mapping[str, Dataset], processor: Any) -> dict[str, Cells]:
    """Images, resized and preprocessed once."""
    return {key: Cells(split, processor, PIXELS, keep=True) for key, split in splits.items()}


def digits(data: Dataset, low: int, high: int) -> Dataset:
    """The digits from low to high, as classes from 0."""
    labels = np.asarray(data["label"][:])
    rows = np.flatnonzero((labels >= low) & (labels <= high))
    chosen = data.select(rows).remove_columns("label").add_column("label", labels[rows] - low)
    return chosen.cast_column("label", ClassLabel(names=[str(digit) for digit in range(low, high + 1)]))


def cells(kind: str | None) -> Dataset:
    """The solar cells of one kind."""
    data = elpv()
    if kind is not None:
        data = data.select(np.flatnonzero(np.asarray(data["cell_type"][:]) == kind))
    return data.remove_columns("cell_type")


def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def arguments(folder: str, **changes: Any) -> TrainingArguments:
    """Arguments of a quiet run with SGD (momentum 0.9, cosine, no clipping, no decay); any can be overridden."""
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "log_level": "error",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    return TrainingArguments(folder, **usual | changes)


def train(
    model: Any,
    config: FTConfig | list[FTConfig],
    data: Mapping[str, Cells],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    tests: tuple[str, ...] = (),
    states: Mapping[str, State] | None = None,
    source: Cells | None = None,
    evaluations: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[FTTrainer, Entry]:
    """Run SGD (momentum 0.9, cosine, no clipping); return the best epoch's validation score, and test scores.

    Args:
        evaluations: how often to evaluate, at equal intervals, instead of after every epoch; the best one counts.
    """
    when: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
    if evaluations:
        every = max(1, epochs * -(-len(data["train"]) // batch_size) // evaluations)
        when = {f"{what}_strategy": "steps" for what in ("eval", "save", "logging")}
        when |= {f"{what}_steps": every for what in ("eval", "save", "logging")}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            **when,
            save_total_limit=1,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="balanced_accuracy",
            seed=seed,
        )
        trainer = FTTrainer(
            model,
            args,
            strategy=config,
            states=states,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            source_dataset=source,
            callbacks=list(callbacks),
            data_collator=channels_last,
            compute_metrics=classification_metrics,
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        found: Entry = {"seconds": time.perf_counter() - started, "validation": trainer.state.best_metric}
        for split in tests:
            metrics = trainer.predict(data[split]).metrics or {}
            found[split] = metrics["test_balanced_accuracy"]
        return trainer, found


class Runs:
    """The results file, with one line per run. Runs that are already there are not repeated.

    Args:
        file: of JSON lines.
        names: the keys that identify a run.
    """

    def __init__(self, file: Path, names: tuple[str, ...]) -> None:
        self.file, self.names = file, names
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.found = {self._key(entry): entry for entry in map(json.loads, lines)}

    def _key(self, entry: Entry) -> str:
        return json.dumps([entry[name] for name in self.names])

    def get(self, entry: Entry, make: Callable[[], Entry]) -> Entry:
        key = self._key(entry)
        if key not in self.found:
            entry = {**entry, **make(), "torch": torch.__version__, "transformers": transformers.__version__}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry) + "\n")
            self.found[key] = entry
            scores = ", ".join(f"{k} {entry[k]:.3f}" for k in ("validation", "test", "ood") if k in entry)
            told = " ".join(f"{entry[n]:.1e}" if isinstance(entry[n], float) else str(entry[n]) for n in self.names)
            print(f"{told}: {scores}, {entry['seconds']:.0f} s", flush=True)
        return self.found[key]


def tune(score: Callable[[dict[str, float]], float], space: Mapping[str, tuple[float, float]], trials: int) -> Entry:
    """The values with the best score among log-uniform draws, as many for every strategy."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.QMCSampler(scramble=True, seed=0))

    def objective(trial: optuna.Trial) -> float:
        return score({name: trial.suggest_float(name, *bounds, log=True) for name, bounds in space.items()})

    study.optimize(objective, n_trials=trials)
    return study.best_params
