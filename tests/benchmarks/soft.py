"""Soft fine-tuning compared with its controls, on real images: `python tests/benchmarks/soft.py`.

The source network is an ImageNet MobileNetV2 that this script first trains on the source data by `hf-ft train`. All
images are at 64 px.

- `digits_*`: MNIST's digits 0 to 6 -> UCI's digits 0 to 6, with 50, 100 and 200 images, and with 100 images in which
  each class has about two thirds as many as the previous one, 36 to 3 (a biased sample; validation and test are not
  biased). Classes that neither loss sees: the digits 7, 8 and 9 of both.
- `poly_*`: monocrystalline -> polycrystalline cells of ELPV (defective or not), with 100 and 300 images. Classes that
  neither loss sees: the ten UCI digits.

Every method gets the same tuning budget: the same number of trials (seed 0) of its learning rate and of its weight,
drawn log-uniformly and evaluated by the mean balanced validation accuracy over the last quarter of a run, since the
best of many noisy values is too optimistic. The best setting then runs with three other seeds, each with its own
training images, new head and order; the test split is used once per seed. All train with SGD (momentum 0.9, cosine, no
clipping, no augmentation), are evaluated 20 times per run, and keep the best evaluation. In the final runs the frozen
features' general discrimination is also measured four times. The source network with its own head, which all methods
replace by a new one, is scored for comparison. Every run is a line of the results file; runs that are already there are
not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import channels_last
from common import PIXELS, Runs, cells, digits, quiet, ready, train, tune
from datasets import Dataset, DatasetDict
from matplotlib.figure import Figure
from sklearn.metrics import balanced_accuracy_score
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

from hf_ft import CoTuningConfig, FullConfig, LwFConfig, SoftConfig
from hf_ft.cli import main as hf_ft
from hf_ft.core.config import FTConfig
from hf_ft.diagnostics.discrimination import GeneralDiscriminationCallback
from hf_ft.splits import stratified_split
from hf_ft.zoo.datasets import mnist5k, uci_digits
from hf_ft.zoo.models import load_model

RESULTS = Path(__file__).parent / "results" / "soft.jsonl"
RATE = (3e-4, 2e-2)
EVALUATIONS = 20
MEASURED = 5  # evaluations between measurements of the general discrimination
HELD_OUT = 200  # samples of each set of classes that neither loss sees
KNOWN = 7  # training uses the digits below it
# task -> training images, epochs, batch size. No smaller batches: BatchNorm statistics of two images are noise.
TASKS = {
    "digits_50": (50, 20, 10),
    "digits_100": (100, 16, 20),
    "digits_200": (200, 10, 20),
    "digits_100_biased": (100, 16, 20),
    "poly_100": (100, 16, 20),
    "poly_300": (300, 8, 20),
}
VALIDATION, TEST = 140, 700
Make = Callable[[float], FTConfig]
# method -> the config for a weight, and the weight's range: a tenth of the default to ten times it
METHODS: dict[str, tuple[Make, tuple[float, float]]] = {
    "full": (lambda _: FullConfig(), (0.1, 10.0)),  # its trials vary only the rate
    "joint": (lambda weight: SoftConfig(schedule="constant", weight=weight, norm_mode="auto"), (0.1, 10.0)),
    "abrupt": (lambda weight: SoftConfig(schedule="step", weight=weight, norm_mode="auto"), (0.1, 10.0)),
    "soft, linear": (lambda weight: SoftConfig(weight=weight, norm_mode="auto"), (0.1, 10.0)),
    "soft, cosine": (lambda weight: SoftConfig(schedule="cosine", weight=weight, norm_mode="auto"), (0.1, 10.0)),
    "lwf": (lambda weight: LwFConfig(weight=weight), (0.4, 40.0)),
    "co_tuning, direct": (lambda weight: CoTuningConfig(weight=weight), (0.23, 23.0)),
    "co_tuning, reverse": (lambda weight: CoTuningConfig(weight=weight, relationship="reverse"), (0.23, 23.0)),
}


UNTOUCHED = "source network as it is"


def source_data(task: str) -> Dataset:
    return digits(mnist5k(), 0, KNOWN - 1) if task.startswith("digits") else cells("mono")


def target_data(task: str) -> Dataset:
    return digits(uci_digits(), 0, KNOWN - 1) if task.startswith("digits") else cells("poly")


def unseen_data(task: str) -> dict[str, Dataset]:
    """Classes that neither loss sees, by name."""
    if task.startswith("digits"):
        return {"uci_789": digits(uci_digits(), KNOWN, 9), "mnist_789": digits(mnist5k(), KNOWN, 9)}
    return {"uci_digits": uci_digits()}


def source_model(task: str, folder: Path) -> Path:
    """The network trained on the task's source by `hf-ft train`; trained if missing."""
    name = "mnist_0_6" if task.startswith("digits") else "mono"
    made = folder / name
    if not (made / "config.json").is_file():
        data = folder / f"{name}_data"
        DatasetDict({"train": source_data(task)}).save_to_disk(str(data))
        flags = {
            "model": "mobilenet_v2",
            "dataset": data,
            "image_size": PIXELS,
            "augment": "none",
            "num_train_epochs": 4 if task.startswith("digits") else 12,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "output_dir": made,
        }
        if hf_ft(["train", *(f"--{key}={value}" for key, value in flags.items())]):
            raise SystemExit(f"the source network of {task} was not trained")
    return made


def biased(data: Dataset, size: int, seed: int) -> np.ndarray:
    """Rows in which each class has about two thirds as many as the previous one."""
    labels, random = np.asarray(data["label"][:]), np.random.default_rng(seed)
    shares = 0.65 ** np.arange(labels.max() + 1)
    counts = np.round(size * shares / shares.sum()).astype(int)
    counts[0] += size - counts.sum()
    picked = [random.permutation(np.flatnonzero(labels == c))[: counts[c]] for c in range(len(counts))]
    return np.concatenate(picked)


class SometimesMeasured(GeneralDiscriminationCallback):
    """Measures at some of the evaluations."""

    seen = 0

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.seen += 1
        if self.seen % MEASURED == 0:
            super().on_evaluate(*args, **kwargs)


class Task:
    """A task: its images for each seed, its network, its source data."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.images, self.epochs, self.batch_size = TASKS[name]
        self.dataset, self.folder = target_data(name), source_model(name, folder)
        self.names = dict(enumerate(self.dataset.features["label"].names))
        processor = self.model(0)[1]
        self.source = ready({"source": source_data(name)}, processor)["source"]
        self.unseen = {
            key: DataLoader(
                ready({key: stratified_split(rows, HELD_OUT, 0, 0, seed=0)["train"]}, processor)[key],
                batch_size=50,
                collate_fn=channels_last,
            )
            for key, rows in unseen_data(name).items()
        }
        self._data: dict[int, Any] = {}

    def model(self, seed: int) -> Any:
        options: dict[str, Any] = {"image_size": PIXELS, "seed": seed, "keep_source_head": True}
        return load_model(str(self.folder), id2label=self.names, **options)

    def data(self, seed: int) -> Any:
        if seed not in self._data:
            pool = len(self.dataset) - VALIDATION - TEST
            splits = stratified_split(self.dataset, pool, VALIDATION, TEST, seed=seed)
            if "biased" in self.name:
                rows = biased(splits["train"], self.images, seed)
                splits["train"] = splits["train"].select(rows)
            else:
                splits["train"] = stratified_split(splits["train"], self.images, 0, 0, seed=seed)["train"]
            self._data = {seed: ready(splits, self.model(0)[1])}
        return self._data[seed]

    def untouched(self, runs: Runs, seed: int) -> dict[str, Any]:
        """The score of the source network with its own head: source and target have the same classes."""
        entry = {
            "task": self.name,
            "method": UNTOUCHED,
            "learning_rate": 0.0,
            "weight": 0.0,
            "seed": seed,
            "final": True,
        }

        def make() -> dict[str, Any]:
            model, started = AutoModelForImageClassification.from_pretrained(self.folder).eval(), time.perf_counter()
            found, labels = [], []
            with torch.no_grad():
                for batch in DataLoader(self.data(seed)["test"], batch_size=50, collate_fn=channels_last):
                    found += model(pixel_values=batch["pixel_values"]).logits.argmax(1).tolist()
                    labels += batch["labels"].tolist()
            return {"seconds": time.perf_counter() - started, "test": balanced_accuracy_score(labels, found)}

        return runs.get(entry, make)

    def run(self, runs: Runs, method: str, rates: dict[str, float], seed: int, final: bool) -> dict[str, Any]:
        entry = {"task": self.name, "method": method, **rates, "seed": seed, "final": final}

        def make() -> dict[str, Any]:
            config = METHODS[method][0](rates["weight"])
            measured = SometimesMeasured(self.unseen) if final else None
            trainer, found = train(
                self.model(seed)[0],
                config,
                self.data(seed),
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=rates["learning_rate"],
                seed=seed,
                tests=("test",) if final else (),
                source=self.source if config.needs().source_data == "required" else None,
                evaluations=EVALUATIONS,
                callbacks=[measured] if measured else [],
            )
            log = trainer.state.log_history
            found["curve"] = [(e["step"], e["eval_balanced_accuracy"]) for e in log if "eval_balanced_accuracy" in e]
            late = [accuracy for _, accuracy in found["curve"][-EVALUATIONS // 4 :]]
            found["late"] = sum(late) / len(late)
            if measured:
                found["discrimination"] = [
                    (step, {key: (one.linear_probe, one.nearest_class_mean) for key, one in by_name.items()})
                    for step, by_name in measured.history
                ]
            return found

        return runs.get(entry, make)


def plot(results: Path, file: Path) -> None:
    """Plot validation accuracy and general discrimination over training, as means over seeds, one row per task."""
    runs = [run for run in map(json.loads, results.read_text(encoding="utf-8").splitlines()) if run["final"]]
    tasks = [task for task in TASKS if any(run["task"] == task for run in runs)]
    figure = Figure(figsize=(13, 2.6 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), 3, squeeze=False)
    for task, axes in zip(tasks, rows, strict=True):
        for color, method in enumerate(METHODS):
            chosen = [run for run in runs if run["task"] == task and run["method"] == method]
            if not chosen:
                continue
            look = {"color": f"C{color}", "marker": "."}
            steps = [step for step, _ in chosen[0]["curve"]]
            accuracies = np.mean([[value for _, value in run["curve"]] for run in chosen], axis=0)
            axes[0].plot(steps, accuracies, label=method, **look)
            names = list(chosen[0]["discrimination"][0][1])
            for axis, name in zip(axes[1:], names, strict=False):
                times = [step for step, _ in chosen[0]["discrimination"]]
                found = np.mean([[by[name][0] for _, by in run["discrimination"]] for run in chosen], axis=0)
                axis.plot(times, found, **look)
                axis.set_title(f"linear probe on {name}", fontsize="medium")
        for axis in axes:
            axis.grid(alpha=0.3)
        if len(names) < 2:
            axes[2].set_axis_off()
        axes[0].set_title(f"{task}: validation accuracy", fontsize="medium")
    rows[0][0].legend(fontsize="x-small")
    for axis in rows[-1]:
        axis.set_xlabel("step")
    figure.savefig(file, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default="", help="only names that begin with one of these, separated by commas")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sources", type=Path, default=Path("runs/benchmarks/soft"), help="source networks")
    parser.add_argument("--rates", help="try only these, with the final seeds, evaluated on validation")
    parser.add_argument("--plot", type=Path, help="train nothing, and plot the results file into this file")
    options = parser.parse_args()
    if options.plot:
        plot(options.results, options.plot)
        return
    torch.set_num_threads(options.threads)
    quiet()
    runs = Runs(options.results, ("task", "method", "learning_rate", "weight", "seed", "final"))
    for name in options.tasks.split(","):
        task = Task(name, options.sources)
        for seed in range(1, options.seeds + 1) if not options.rates else ():
            task.untouched(runs, seed)
        for method, (_, weights) in METHODS.items():
            if not method.startswith(tuple(options.methods.split(","))):
                continue

            if options.rates:
                for rate in map(float, options.rates.split(",")):
                    rates = {"learning_rate": rate, "weight": 1.0}
                    found = [task.run(runs, method, rates, s, final=False)["late"] for s in range(1, options.seeds + 1)]
                    print(f"{name} {method} {rate}: {np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}", flush=True)
                continue

            def score(rates: dict[str, float], task: Task = task, method: str = method) -> float:
                return task.run(runs, method, rates, 0, final=False)["late"]

            best = tune(score, {"learning_rate": RATE, "weight": weights}, options.trials)
            finals = [task.run(runs, method, best, seed, final=True) for seed in range(1, options.seeds + 1)]
            print(
                json.dumps({"task": name, "method": method, **best, "test": [run["test"] for run in finals]}),
                flush=True,
            )


if __name__ == "__main__":
    main()
