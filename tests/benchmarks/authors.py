"""The effect of the authors' settings on small natural-image tasks: `python tests/benchmarks/authors.py FOLDER`.

FOLDER holds image folders with the splits train, validation and test. Each setting trains an ImageNet MobileNetV2 at 96
px for 12 epochs (SGD with momentum 0.9, cosine, batches of 32, no augmentation), at the same rate except for the linear
probes and LP-FT, with three seeds. It prints the balanced accuracies of the last epoch on validation, which any choice
should be based on, and on test, mean ± standard deviation. Runs are kept in tests/benchmarks/results/authors.jsonl;
those that are already there are not repeated.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import Entry, Runs, arguments, quiet
from transformers import PrinterCallback

from hf_ft import DELTAConfig, FTTrainer, FullConfig, LinearProbeConfig, LPFTConfig, LwFConfig
from hf_ft.data.classifier import load_classifier
from hf_ft.data.columns import find_columns
from hf_ft.data.load import load_splits
from hf_ft.data.task import Data, process
from hf_ft.metrics import classification_metrics

RESULTS = Path(__file__).parent / "results" / "authors.jsonl"
MODEL, PIXELS, EPOCHS, RATE, SEEDS = "mobilenet_v2", 96, 12, 3e-3, (1, 2, 3)
STILL = 3e-4  # of LP-FT: with BatchNorm in eval mode, RATE ends at chance
BEFORE = {"dropout": True, "fresh_optimizer": False}
# setting -> config, learning rate, weight decay
SETTINGS: dict[str, tuple[Any, float, float]] = {
    "full": (FullConfig(), RATE, 0.0),
    "linear_probe, sgd 3e-3": (LinearProbeConfig(), 3e-3, 0.0),
    "linear_probe, sgd 1e-2": (LinearProbeConfig(), 1e-2, 0.0),
    "linear_probe, lbfgs": (LinearProbeConfig(probe_solver="lbfgs"), 1e-2, 0.0),
    "lp_ft, dropout and momentum kept": (LPFTConfig(**BEFORE), STILL, 0.0),
    "lp_ft, dropout kept": (LPFTConfig(dropout=True), STILL, 0.0),
    "lp_ft": (LPFTConfig(), STILL, 0.0),
    "lp_ft, lbfgs": (LPFTConfig(probe_solver="lbfgs"), STILL, 0.0),
    "lwf, source head trains": (LwFConfig(train_source_head=True), RATE, 0.0),
    "lwf, source head still": (LwFConfig(), RATE, 0.0),
    "delta, uniform, alpha 0.01": (DELTAConfig(weights="uniform", alpha=0.01), RATE, 0.0),
    "delta, uniform, alpha 0.64": (DELTAConfig(weights="uniform"), RATE, 0.0),
    "delta, uniform, alpha 6.4": (DELTAConfig(weights="uniform", alpha=6.4), RATE, 0.0),
    "delta, uniform, alpha 0.64, weight decay 1e-3": (DELTAConfig(weights="uniform"), RATE, 1e-3),
    "delta, feature map, alpha 0.64": (DELTAConfig(weights="feature_map"), RATE, 0.0),
    "delta, feature map, alpha 0.01": (DELTAConfig(weights="feature_map", alpha=0.01), RATE, 0.0),
}


class Task:
    """A folder of images, preprocessed once."""

    def __init__(self, folder: Path) -> None:
        splits = load_splits(str(folder))
        self.columns = find_columns(splits)
        model, self.processor = self.load(0, False)
        self.data = process(Data(splits, self.columns), model, self.processor, in_memory=True)

    def load(self, seed: int, keep: bool) -> tuple[Any, Any]:
        return load_classifier(MODEL, self.columns, seed, PIXELS, keep_source_head=keep)

    def run(self, name: str, seed: int) -> Entry:
        config, rate, decay = SETTINGS[name]
        transformers.set_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            args = arguments(folder, num_train_epochs=EPOCHS, learning_rate=rate, weight_decay=decay, seed=seed)
            trainer = FTTrainer(
                self.load(seed, config.needs().source_head)[0],
                args,
                strategy=config,
                train_dataset=self.data.splits["train"],
                data_collator=self.data.collate,
                compute_metrics=classification_metrics,
            )
            trainer.remove_callback(PrinterCallback)
            started, processor = time.perf_counter(), time.process_time()
            trainer.train()
            found: Entry = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - processor}
            for split in ("validation", "test"):
                metrics = trainer.predict(self.data.splits[split]).metrics or {}
                found[split] = metrics["test_balanced_accuracy"]
        return found


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), help="only these")
    options = parser.parse_args()
    quiet()
    runs = Runs(RESULTS, ("task", "setting", "seed"))
    for folder in options.folder:
        task: Task | None = None
        rows = []
        for name in options.settings:
            entries = []
            for seed in SEEDS:
                key = {"task": folder.name, "setting": name, "seed": seed, "threads": torch.get_num_threads()}

                def make(name: str = name, seed: int = seed, folder: Path = folder) -> Entry:
                    nonlocal task
                    task = task or Task(folder)
                    return task.run(name, seed)

                entries.append(runs.get(key, make))
            rows.append(
                (name, *(_spread([entry[k] for entry in entries]) for k in ("validation", "test", "cpu_seconds")))
            )
        print(f"\n{folder.name}\n\n| setting | validation | test | CPU seconds |\n| --- | --- | --- | --- |")
        for row in rows:
            print("| " + " | ".join(row) + " |")


def _spread(values: list[float]) -> str:
    digits = 3 if max(values) <= 1 else 0
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


if __name__ == "__main__":
    main()
