"""AMCF compared with its source models and their plain ensemble, on real images: `python tests/benchmarks/amcf.py`.

Source models, all at 64 px: A, the ImageNet MobileNetV2; B, the ImageNet EfficientNet-Lite0 (whose input is normalised
differently); C, A after fine-tuning on 4,000 digits of MNIST, which this script does first. Targets: 100 UCI digits,
and 500 solar cells of ELPV (defective or not).

A method is a subset of the sources, whether their first layers stay frozen (`chosen`: found by the swarm, once per set
of sources, at rate 0.01 on the training images of the tuning split) or all layers train (`all`), and the weight of the
members' disagreement. Two or three sources are also combined without any joint training: each is fine-tuned alone, at
its own best rate, and the logits are summed (`plain ensemble`).

All BatchNorm layers have momentum 0.1. Most of B's have 0.01, which suits long training: in the 80 to 100 steps of a
run here, their statistics lag behind the weights, and scores in evaluation mode fall. `--momentum auto`, with other
`--results` and `--work`, shows by how much: it corrects only TensorFlow's decay.

Every method gets the same tuning budget: the same number of trials of its learning rate, drawn log-uniformly and
evaluated by the mean balanced validation accuracy over the last quarter of a run (seed 100). The best rate then runs
with three other seeds, each with its own training images, heads and order; the test split is used once per seed. SGD,
momentum 0.9, cosine, no clipping, no augmentation; each run is evaluated eight times, and the best evaluation is kept.
Every run is a line of the results file; runs that are already there are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import channels_last
from common import PIXELS, Runs, cells, quiet, ready, train, tune
from datasets import Dataset
from matplotlib.figure import Figure
from sklearn.metrics import balanced_accuracy_score

from hf_ft import AMCFConfig, FTTrainer
from hf_ft.cli import main as hf_ft
from hf_ft.splits import stratified_split
from hf_ft.strategies.amcf.plot import plot_scores, plot_swarm
from hf_ft.testing.training import tiny_arguments
from hf_ft.zoo.datasets import uci_digits
from hf_ft.zoo.sources import load_sources

RESULTS = Path(__file__).parent / "results" / "amcf.jsonl"
# The search's training arguments.
AS_THE_AUTHORS = {
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.01,
    "weight_decay": 5e-4,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.0,
}
RATE = (1e-3, 1e-1)
EVALUATIONS = 8
TUNING_SEED, SEEDS = 100, (0, 1, 2)
# task -> training images, validation images, epochs, batch size
TASKS = {"uci_100": (100, 200, 20, 20), "elpv_500": (500, 250, 8, 50)}
# task -> options of the search that differ from the paper's
SEARCH: dict[str, dict[str, int]] = {"uci_100": {}, "elpv_500": {"search_epochs": 3, "patience": 2}}


@dataclass(frozen=True)
class Method:
    """Which sources train together, and how."""

    sources: str
    frozen: str = "all"
    consistency: float = 0.2

    @property
    def name(self) -> str:
        together = f", consistency {self.consistency:g}" if len(self.sources) > 1 else ""
        return f"{'+'.join(self.sources)} {self.frozen}{together}"


METHODS = [
    *(Method(source, frozen) for source in "ABC" for frozen in ("all", "chosen")),
    *(Method("AB", frozen, weight) for frozen in ("all", "chosen") for weight in (0.0, 0.2)),
    *(Method("ABC", frozen) for frozen in ("all", "chosen")),
]
ENSEMBLES = [("AB", "all"), ("ABC", "all"), ("AB", "chosen"), ("ABC", "chosen")]


def target(task: str) -> Dataset:
    return uci_digits() if task.startswith("uci") else cells(None)


def source_models(folder: Path) -> dict[str, str]:
    """The sources by letter; C is trained if it is missing."""
    made = folder / "mnist"
    if not (made / "model.safetensors").is_file():
        size = f"--image_size {PIXELS} --augment none --seed 0 --disable_tqdm true"
        length = "--num_train_epochs 3 --per_device_train_batch_size 50 --learning_rate 1e-2 --optim sgd"
        words = f"train --model mobilenet_v2 --dataset mnist5k {size} {length} --output_dir {made} --overwrite true"
        if hf_ft([*words.split(), "--optim_args", "momentum=0.9", "--lr_scheduler_type", "cosine"]):
            raise SystemExit("the source model could not be trained")
    return {"A": "mobilenet_v2", "B": "efficientnet-lite0", "C": str(made)}


class Task:
    """One task's runs."""

    def __init__(self, name: str, runs: Runs, folder: Path, trials: int, momentum: Any) -> None:
        self.name, self.runs, self.folder, self.trials, self.momentum = name, runs, folder, trials, momentum
        self.models = source_models(folder)
        self.size, self.validation, self.epochs, self.batch = TASKS[name]
        self._kept: tuple[Any, Any] | None = None  # the last split, prepared

    def run_all(self) -> None:
        for method in METHODS:
            rate = self.tuned(method)
            for seed in SEEDS:
                self.run(method, rate, seed, final=True)
        for sources, frozen in ENSEMBLES:
            for seed in SEEDS:
                self.ensemble(sources, frozen, seed)

    def tuned(self, method: Method) -> float:
        found = tune(lambda values: self.run(method, values["rate"], TUNING_SEED)["late"], {"rate": RATE}, self.trials)
        return found["rate"]

    def run(self, method: Method, rate: float, seed: int, final: bool = False) -> dict[str, Any]:
        entry = {"task": self.name, "method": method.name, "rate": rate, "seed": seed, "final": final}
        return self.runs.get(entry, lambda: self._run(method, rate, seed, final))

    def _run(self, method: Method, rate: float, seed: int, final: bool) -> dict[str, Any]:
        frozen = self.chosen(method.sources) if method.frozen == "chosen" else (0,) * len(method.sources)
        model, data = self.ready(method.sources, seed)
        config = AMCFConfig(
            frozen=frozen, norm_mode="auto", consistency=method.consistency, batch_norm_momentum=self.momentum
        )
        trainer, found = train(
            model,
            config,
            data,
            epochs=self.epochs,
            batch_size=self.batch,
            learning_rate=rate,
            seed=seed,
            evaluations=EVALUATIONS,
        )
        scores = [e["eval_balanced_accuracy"] for e in trainer.state.log_history if "eval_balanced_accuracy" in e]
        found |= {"late": float(np.mean(scores[-EVALUATIONS // 4 :])), "frozen": list(frozen)}
        if final:
            predicted = trainer.predict(data["test"])
            file = self._logits(method.name, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(file, logits=predicted.predictions.astype(np.float32), labels=predicted.label_ids)
            found["test"] = float(balanced_accuracy_score(predicted.label_ids, predicted.predictions.argmax(axis=-1)))
        return found

    def ensemble(self, sources: str, frozen: str, seed: int) -> None:
        """The summed logits of sources that were fine-tuned alone."""
        name = f"{'+'.join(sources)} {frozen}, plain ensemble"
        entry = {"task": self.name, "method": name, "rate": 0.0, "seed": seed, "final": True}

        def score() -> dict[str, Any]:
            alone = [np.load(self._logits(Method(source, frozen).name, seed)) for source in sources]
            logits = np.sum([one["logits"] for one in alone], axis=0)
            return {
                "test": float(balanced_accuracy_score(alone[0]["labels"], logits.argmax(axis=-1))),
                "seconds": 0.0,
            }

        self.runs.get(entry, score)

    def _logits(self, method: str, seed: int) -> Path:
        return self.folder / "logits" / self.name / f"{method.replace(' ', '_').replace(',', '')}-{seed}.npz"

    def ready(self, sources: str, seed: int) -> tuple[Any, Mapping[str, Any]]:
        """The sources with new heads, and the images of a split as they expect them."""
        names = [self.models[source] for source in sources]
        model, processor = load_sources(names, id2label=self._classes(), image_size=PIXELS, seed=seed)
        if self._kept is None or self._kept[0] != (sources, seed):
            splits = stratified_split(target(self.name), self.size, self.validation, seed=seed)
            if seed == TUNING_SEED:
                splits.pop("test")  # never used
            self._kept = (sources, seed), ready(splits, processor)
        return model, self._kept[1]

    def _classes(self) -> dict[int, str]:
        return dict(enumerate(target(self.name).features["label"].names))

    def chosen(self, sources: str) -> tuple[int, ...]:
        """How many layers of each source stay frozen: the swarm's result, saved with its plots."""
        folder = self.folder / "swarm" / self.name
        file = self.runs.file.parent / f"amcf_swarm_{self.name}_{sources}.json"
        config = AMCFConfig(
            norm_mode="auto",
            storage=str(self.folder / "swarm.db"),
            metric="balanced_accuracy",
            batch_norm_momentum=self.momentum,
            **SEARCH[self.name],
        )
        if not file.is_file():
            model, data = self.ready(sources, TUNING_SEED)
            args = tiny_arguments(
                folder,
                **AS_THE_AUTHORS,
                per_device_train_batch_size=self.batch,
                remove_unused_columns=False,
            )
            trainer = FTTrainer(model, args, strategy=config, train_dataset=data["train"], data_collator=channels_last)
            state = config.measure(model, trainer.context())
            scores = config.scores(state)
            folder.mkdir(parents=True, exist_ok=True)
            plot_swarm(scores, folder / f"{sources}_swarm.png")
            if len(sources) < 3:
                plot_scores(scores, folder / f"{sources}_scores.png")
            file.write_text(json.dumps(dict(state.info)) + "\n", encoding="utf-8")
            print(f"{self.name} {sources}: {config.learned(state)}", flush=True)
        return tuple(json.loads(file.read_text(encoding="utf-8"))["frozen"])


def finals(results: Path, task: str) -> dict[str, dict[int, float]]:
    """Test scores by method and seed."""
    found: dict[str, dict[int, float]] = {}
    for entry in map(json.loads, results.read_text(encoding="utf-8").splitlines()):
        if entry["final"] and entry["task"] == task:
            found.setdefault(entry["method"], {})[entry["seed"]] = entry["test"]
    return found


def rows_of(results: Path, task: str) -> list[tuple[str, ...]]:
    """A table's rows: mean and standard deviation, and the gain over the plain ensemble of the same sources."""
    found, rows = finals(results, task), []
    for method, scores in sorted(found.items(), key=lambda item: (len(item[0].split()[0]), item[0])):
        values = np.array([scores[seed] for seed in sorted(scores)])
        control = found.get(f"{method.split()[0]} all, plain ensemble")
        gain = ""
        if control and "plain" not in method:
            gaps = 100 * (values - np.array([control[seed] for seed in sorted(scores)]))
            gain = f"{gaps.mean():+.1f} ± {gaps.std(ddof=1) / len(gaps) ** 0.5:.1f}"
        rows.append((method, f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1):.1f}", gain))
    return rows


def table(results: Path) -> str:
    lines = []
    for task in TASKS:
        lines += [f"{task}:", "", "| method | test | minus plain ensemble |", "| --- | --- | --- |"]
        lines += ["| " + " | ".join(row) + " |" for row in rows_of(results, task)] + [""]
    return "\n".join(lines)


def plot(results: Path, file: Path) -> None:
    """Every method's three test scores, task by task."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(1, len(TASKS), sharey=True)
    rows = [row[0] for task in TASKS for row in rows_of(results, task)]
    names = sorted(dict.fromkeys(rows), key=lambda name: (len(name.split()[0]), name), reverse=True)
    for task, panel in zip(TASKS, axes, strict=True):
        found = finals(results, task)
        for place, name in enumerate(names):
            if name not in found:
                continue
            colour = "#b2182b" if "plain" in name else "#2166ac" if "+" in name else "#666666"
            values = [100 * value for value in found[name].values()]
            panel.plot(values, [place] * len(values), "o", color=colour, alpha=0.6)
            panel.plot([np.mean(values)], [place], "|", color=colour, markersize=14, markeredgewidth=2)
        panel.set_yticks(range(len(names)), names)
        panel.set_title(task)
        panel.set_xlabel("balanced accuracy on test, %")
        panel.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--momentum", default="0.1", help="batch_norm_momentum of every method: a number, auto or keep")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/amcf"), help="source C, logits, trials")
    parser.add_argument("--table", action="store_true", help="only print the tables of the stored runs")
    parser.add_argument("--plot", type=Path, help="only plot the stored runs")
    options = parser.parse_args()
    if options.table or options.plot:
        print(table(options.results))
        if options.plot:
            plot(options.results, options.plot)
        return
    torch.set_num_threads(options.threads)
    quiet()
    runs = Runs(options.results, ("task", "method", "rate", "seed", "final"))
    for name in options.tasks.split(","):
        momentum = options.momentum if options.momentum in ("auto", "keep") else float(options.momentum)
        Task(name, runs, options.work, options.trials, momentum).run_all()
    print(table(options.results))


if __name__ == "__main__":
    main()
