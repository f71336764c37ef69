"""Which schedule of the search ranks positions better: `python tests/benchmarks/schedules.py FOLDER`.

FOLDER holds image folders with the splits train and validation. Twelve positions of AMCF on ImageNet's MobileNetV2 and
EfficientNet-Lite0 at 64 px are scored as in the search (5 epochs, a quarter of the training images held out), with the
run's cosine and with a constant rate. Each is then trained on all training images (12 epochs, SGD 0.01 with momentum,
cosine), and scored on validation. The script prints Spearman's rank correlation between the two. Positions are kept in
tests/benchmarks/results/schedules.jsonl; those that are already there are not trained again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Entry, Runs, arguments, quiet
from scipy.stats import spearmanr
from transformers import PrinterCallback

from hf_ft import AMCFConfig, FTTrainer, SwarmSearch
from hf_ft.data.classifier import load_ensemble
from hf_ft.data.columns import find_columns
from hf_ft.data.load import load_splits
from hf_ft.data.task import Data, process
from hf_ft.metrics import classification_metrics

RESULTS = Path(__file__).parent / "results" / "schedules.jsonl"
SOURCES, PIXELS, POSITIONS, EPOCHS = ("mobilenet_v2", "efficientnet-lite0"), 64, 12, 12
SCHEDULES, METRICS = ("run", "constant"), ("accuracy", "loss")


class Task:
    """A folder of images, preprocessed once, and what is trained on it."""

    def __init__(self, folder: Path) -> None:
        splits = load_splits(str(folder))
        self.columns = find_columns(splits)
        model, processor = load_ensemble(SOURCES, self.columns, 0, PIXELS)
        self.layers = AMCFConfig().layers(model)
        self.data = process(Data(splits, self.columns), model, processor, in_memory=True)

    def positions(self) -> list[tuple[int, ...]]:
        random = np.random.default_rng(0)
        return [tuple(int(random.integers(count)) for count in self.layers) for _ in range(POSITIONS)]

    def trainer(self, config: AMCFConfig) -> FTTrainer:
        args = arguments(tempfile.mkdtemp(), num_train_epochs=EPOCHS, learning_rate=0.01, weight_decay=5e-4)
        trainer = FTTrainer(
            load_ensemble(SOURCES, self.columns, 0, PIXELS)[0],
            args,
            strategy=config,
            train_dataset=self.data.splits["train"],
            data_collator=self.data.collate,
            compute_metrics=classification_metrics,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def search(self, schedule: str, metric: str) -> SwarmSearch:
        config = AMCFConfig(norm_mode="auto", search_schedule=schedule, metric=metric, storage="memory")
        trainer = self.trainer(config)
        return SwarmSearch(trainer.model, config, trainer.context(), progress=False)

    def final(self, position: tuple[int, ...]) -> Entry:
        trainer = self.trainer(AMCFConfig(norm_mode="auto", frozen=position))
        trainer.train()
        metrics: Any = trainer.predict(self.data.splits["validation"]).metrics
        return {"accuracy": metrics["test_accuracy"], "loss": -metrics["test_loss"]}


def main() -> None:
    """Run what is missing, and print the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    quiet()
    task, runs = Task(folder), Runs(RESULTS, ("task", "position", "what"))
    searches: dict[tuple[str, str], SwarmSearch] = {}

    def made(position: tuple[int, ...], what: str) -> Entry:
        began = time.perf_counter()
        if what == "final":
            scores = task.final(position)
        else:
            schedule, metric = what.split()
            search = searches.setdefault((schedule, metric), task.search(schedule, metric))
            scores = {"score": max(search.trainings.train(search._start(position), 0))}
        return {**scores, "seconds": time.perf_counter() - began}

    def entries(what: str) -> list[Entry]:
        keys = [{"task": folder.name, "position": list(position), "what": what} for position in task.positions()]
        return [
            runs.get(key, lambda p=p, what=what: made(p, what)) for key, p in zip(keys, task.positions(), strict=True)
        ]

    final = entries("final")
    print("\n| metric of the search | schedule | with final accuracy | with final loss |\n| --- | --- | --- | --- |")
    for metric in METRICS:
        for schedule in SCHEDULES:
            scores = [entry["score"] for entry in entries(f"{schedule} {metric}")]
            found = [spearmanr(scores, [entry[name] for entry in final]).statistic for name in ("accuracy", "loss")]
            print(f"| {metric} | {schedule} | {found[0]:.2f} | {found[1]:.2f} |")


if __name__ == "__main__":
    main()
