"""Which learning rates suit which task: `python tests/benchmarks/rates.py FOLDER/caltech40 FOLDER/cifar10`.

Each strategy trains for 12 epochs (batches of 32, cosine, BatchNorm momentum 0.1, no augmentation, no weight decay)
over a grid of learning rates with SGD (momentum 0.9, no clipping) and with AdamW, on tasks near ImageNet and far from
it, with MobileNetV2 and EfficientNet-Lite0. FOLDERs hold image folders with the splits train, validation and test; the
far tasks (solar cells, MNIST, UCI digits) are built in. Runs are kept in tests/benchmarks/results/rates.jsonl; those
that are already there are not repeated. `--page` writes their tables into docs/rates.md.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from common import Entry, Runs, arguments, quiet
from datasets import DatasetDict
from torch import nn
from transformers import EvalPrediction, PrinterCallback

from hf_ft import (
    AdaFilterConfig,
    AutoRGNConfig,
    BitFitConfig,
    BiTuningConfig,
    BlockwiseConfig,
    BSSConfig,
    ChildTuningConfig,
    DAFTConfig,
    DELTAConfig,
    FTConfig,
    FTTrainer,
    FullConfig,
    GradualUnfreezingConfig,
    L2SPConfig,
    LayerDecayConfig,
    LinearProbeConfig,
    LPFTConfig,
    NormsOnlyConfig,
    PEFTConfig,
    RIFLEConfig,
    SpotTuneConfig,
    StochNormConfig,
    TREDConfig,
)
from hf_ft.core.compose import recommended_arguments, resolve
from hf_ft.core.context import Samples
from hf_ft.core.head_rate import HeadFit, fit_head
from hf_ft.data.classifier import load_classifier, load_ensemble
from hf_ft.data.columns import find_columns
from hf_ft.data.load import load_splits
from hf_ft.data.rows import read_rows
from hf_ft.data.task import Data, process
from hf_ft.models.anatomy import anatomy
from hf_ft.zoo.datasets import elpv, mnist5k, uci_digits

RESULTS = Path(__file__).parent / "results" / "rates.jsonl"
HEADS = RESULTS.with_name("rates_heads.json")
PAGE = Path(__file__).parents[2] / "docs" / "rates.md"
EPOCHS, BATCH = 12, 32
SGD, ADAM = "sgd", "adamw_torch"
MOBILE = "mobilenet_v2"
# The family of each network (``config.model_type``), and whether it has BatchNorm.
KINDS = {
    MOBILE: ("mobilenet_v2", True),
    "efficientnet-lite0": ("efficientnet", True),
    "dinov2-small": ("dinov2", False),
}
Grid = dict[str, tuple[float, ...]]
PROBE: Grid = {SGD: (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), ADAM: (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
USUAL: Grid = {SGD: (3e-4, 1e-3, 3e-3, 1e-2), ADAM: (3e-5, 1e-4, 3e-4, 1e-3)}
LOWER: Grid = {SGD: (1e-4, 3e-4, 1e-3, 3e-3), ADAM: (1e-5, 3e-5, 1e-4, 3e-4)}
HIGHER: Grid = {SGD: (1e-2, 3e-2, 1e-1, 3e-1), ADAM: (3e-4, 1e-3, 3e-3, 1e-2)}
LAST = BlockwiseConfig(block="last_quarter")
STRATEGIES: dict[str, tuple[FTConfig | list[FTConfig], Grid]] = {
    "linear_probe": (LinearProbeConfig(head_lr=None), PROBE),
    "full": (FullConfig(), USUAL),
    "full, warm-up": (FullConfig(), USUAL),
    "full, eval": (FullConfig(norm_mode="eval"), LOWER),
    "full, eval, warm-up": (FullConfig(norm_mode="eval"), {SGD: (1e-3, 2e-3, 3e-3), ADAM: (1e-4, 2e-4, 3e-4, 5e-4)}),
    "daft, one rate": (DAFTConfig(head_lr=None), USUAL),
    "daft": (DAFTConfig(), USUAL),
    "daft+l2_sp": ([DAFTConfig(), L2SPConfig()], USUAL),
    "daft+tred": ([DAFTConfig(), TREDConfig()], USUAL),
    "lp_ft": (LPFTConfig(), LOWER),
    "lp_ft, lbfgs": (LPFTConfig(probe_solver="lbfgs"), LOWER),
    "lp_ft, auto": (LPFTConfig(norm_mode="auto"), LOWER),
    "blockwise, last quarter": (LAST, USUAL),
    "delta": (DELTAConfig(), USUAL),
    "l2_sp": (L2SPConfig(), USUAL),
    "bss": (BSSConfig(), USUAL),
    "tred": (TREDConfig(), USUAL),
    "layer_decay": (LayerDecayConfig(), USUAL),
    "gradual_unfreezing": (GradualUnfreezingConfig(), USUAL),
    "bitfit": (BitFitConfig(), HIGHER),
    "norms_only": (NormsOnlyConfig(), HIGHER),
    "peft": (PEFTConfig(), HIGHER),
    "peft, warm-up": (PEFTConfig(), HIGHER),
    "rifle": (RIFLEConfig(), USUAL),
    "stoch_norm": (StochNormConfig(), USUAL),
    "auto_rgn": (AutoRGNConfig(), {SGD: (1e-3, 3e-3, 1e-2, 3e-2), ADAM: (1e-4, 3e-4, 1e-3, 3e-3)}),
    "child_tuning": (ChildTuningConfig(), USUAL),
    "bi_tuning": (BiTuningConfig(), USUAL),
    "spot_tune": (SpotTuneConfig(), USUAL),
    "ada_filter": (AdaFilterConfig(), USUAL),
}
WARM_UP = {"warmup_steps": 0.1}  # over a tenth of the steps
ARGUMENTS = {name: WARM_UP for name in ("full, warm-up", "full, eval, warm-up", "peft, warm-up")}
WARMED_UP = ("full, eval", "peft")  # for these, a warm-up is recommended under AdamW


@dataclass(frozen=True)
class Task:
    """Image data, and the side of the images in pixels."""

    name: str
    pixels: int
    folder: Path | None = None

    @cached_property
    def data(self) -> Data:
        splits = load_splits(str(self.folder)) if self.folder else far_task(self.name)
        return Data(splits, find_columns(splits))


FAR = {"elpv": (500, 128), "mnist": (200, 64), "digits": (100, 64)}  # training images, pixels
NEAR = {"caltech40": 128, "cifar10": 96}
OWN_PIXELS = {"dinov2-small": 112}  # a multiple of its patch size


def far_task(name: str) -> DatasetDict:
    """Images of a built-in dataset: the number above for training, 100 for validation, up to 500 for test."""
    data = {"elpv": elpv, "mnist": mnist5k, "digits": uci_digits}[name]()
    size = FAR[name][0]
    held = data.train_test_split(train_size=size, seed=0, stratify_by_column="label")
    rest = held["test"].train_test_split(train_size=100, test_size=500, seed=0, stratify_by_column="label")
    return DatasetDict(train=held["train"], validation=rest["train"], test=rest["test"])


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Balanced accuracy and mean log loss; nan if training diverged."""
    logits = np.asarray(
        prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    )
    labels = np.asarray(prediction.label_ids)
    right = logits.argmax(-1) == labels
    accuracy = float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
    chosen = torch.from_numpy(logits).double().log_softmax(-1)[torch.arange(len(labels)), torch.from_numpy(labels)]
    return {"accuracy": accuracy if np.isfinite(logits).all() else math.nan, "log_loss": -float(chosen.mean())}


class Bench:
    """A task, preprocessed once for a model, or for an ensemble with a member from each of several."""

    def __init__(self, task: Task, model: str | tuple[str, ...], augment: str = "none") -> None:
        self.task, self.model = task, model
        loaded, processor = self.load(0)
        self.ready = process(replace(task.data, augment=augment), loaded, processor, in_memory=True)

    def load(self, seed: int, keep: bool = False) -> tuple[Any, Any]:
        if isinstance(self.model, tuple):
            return load_ensemble(self.model, self.task.data.columns, seed, self.task.pixels)
        return load_classifier(self.model, self.task.data.columns, seed, self.task.pixels, keep_source_head=keep)

    def run(
        self,
        strategy: FTConfig | list[FTConfig],
        optim: str,
        rate: float,
        seed: int,
        mixing: Mapping[str, float] | None = None,
        **more: Any,
    ) -> Entry:
        configs = [replace(config, batch_norm_momentum=0.1) for config in resolve(strategy)]
        keep = any(config.needs().source_head for config in configs)
        source = any(config.needs().source_data == "required" for config in configs)
        transformers.set_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            args = arguments(
                folder,
                learning_rate=rate,
                eval_strategy="epoch",
                logging_strategy="epoch",
                logging_nan_inf_filter=False,
                seed=seed,
                **({} if optim == SGD else {"optim": optim, "optim_args": None, "max_grad_norm": 1.0}),
                **{"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, **more},
            )
            trainer = FTTrainer(
                self.load(seed, keep)[0],
                args,
                strategy=configs,
                train_dataset=self.ready.splits["train"],
                plain_train_dataset=self.ready.plain,
                eval_dataset=self.ready.splits["validation"],
                source_dataset=self.ready.source if source else None,
                data_collator=self.ready.collate,
                compute_metrics=scores,
                **(mixing or {}),
            )
            trainer.remove_callback(PrinterCallback)
            started, processor = time.perf_counter(), time.process_time()
            trainer.train()
            found: Entry = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - processor}
            history = trainer.state.log_history
            found["curve"] = [round(entry["eval_accuracy"], 4) for entry in history if "eval_accuracy" in entry]
            found["log_losses"] = [round(entry["eval_log_loss"], 4) for entry in history if "eval_log_loss" in entry]
            found["losses"] = [round(float(entry["loss"]), 4) for entry in history if "loss" in entry]
            found["validation"] = found["curve"][-1]
            metrics = trainer.predict(self.ready.splits["test"]).metrics or {}
            found |= {"test": metrics["test_accuracy"], "test_log_loss": metrics["test_log_loss"]}
        return found


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, float, int]]:
    """Strategy, optimizer, rate and seed of each run, ordered so that a part of the runs is already useful."""
    for seed in options.seeds:
        for name in options.strategies:
            for optim in options.optims:
                for rate in options.rates or STRATEGIES[name][1][optim]:
                    yield name, optim, rate, seed


def grids() -> str:
    """The runs as Markdown, means over seeds; linear probes are in those of head_rates.py."""
    tested: dict[tuple[str, ...], dict[float, list[float]]] = {}
    for entry in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        key = tuple(entry[name] for name in ("strategy", "task", "model", "optim"))
        tested.setdefault(key, {}).setdefault(entry["rate"], []).append(entry["test"])
    rows = []
    for (strategy, task, model, optim), runs in tested.items():
        if strategy == "linear_probe":
            continue
        scores = {rate: float(np.mean(each)) for rate, each in runs.items()}
        best = max(scores.values())
        shown = {rate: f"**{score:.3f}**" if score == best else f"{score:.3f}" for rate, score in scores.items()}
        grid = ", ".join(f"{rate:.0e}: {text}".replace("e-0", "e-") for rate, text in sorted(shown.items()))
        rows.append((strategy, task, model, "AdamW" if optim == ADAM else "SGD", grid))
    return markdown_table(("strategy", "task", "model", "optimizer", "test score by rate"), sorted(rows))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def regrets() -> str:
    """What choosing a run of each grid by validation loses on test relative to the best, per rule, as Markdown.

    Each grid is that of the first seed, and of runs that are warmed up if and only if that is recommended.
    """

    def late(values: Sequence[float]) -> float:
        return float(np.mean(values[len(values) // 2 :]))

    rules: dict[str, Callable[[Entry], tuple[float, ...]]] = {
        "accuracy of the best epoch, ties by that of the later half": lambda r: (max(r["curve"]), late(r["curve"])),
        "accuracy of the best epoch": lambda r: (max(r["curve"]),),
        "accuracy of the best epoch, ties by log loss": lambda r: (max(r["curve"]), -np.nanmin(r["log_losses"])),
        "accuracy of the later half": lambda r: (late(r["curve"]),),
        "accuracy of the last epoch": lambda r: (r["curve"][-1],),
        "log loss of the best epoch": lambda r: (-np.nanmin(r["log_losses"]),),
        "log loss of the later half": lambda r: (-late(r["log_losses"]),),
    }
    grids: dict[tuple[str, ...], list[Entry]] = {}
    for entry in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        name = entry["strategy"].removesuffix(", warm-up")
        recommended = (name != entry["strategy"]) == (name in WARMED_UP and entry["optim"] == ADAM)
        if entry["seed"] == 1 and recommended:
            grids.setdefault((entry["task"], entry["model"], name), []).append(entry)
    whole = [runs for runs in grids.values() if len(runs) > 3]
    usual = next(iter(rules.values()))
    chosen = {name: [max(runs, key=rule) for runs in whole] for name, rule in rules.items()}
    chosen["the default, unless the best epoch is better by a standard error"] = [
        cautious(_default(runs), max(runs, key=usual)) for runs in whole
    ]
    chosen["the default"] = list(map(_default, whole))
    rows = []
    for name, each in chosen.items():
        lost = [max(r["test"] for r in runs) - one["test"] for runs, one in zip(whole, each, strict=True)]
        rows.append((name, f"{np.mean(lost):.4f}", f"{max(lost):.3f}"))
    return markdown_table((f"chosen by, of {len(whole)} grids", "mean loss on test", "largest"), rows)


def from_head() -> str:
    """What rates for DAFT lose on test relative to the best of its grids: fixed ones, and fractions of the head's."""
    heads = {tuple(entry["of"]): entry for entry in json.loads(HEADS.read_text(encoding="utf-8"))}
    grids: dict[tuple[str, str], dict[float, list[float]]] = {}
    for entry in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        if (entry["strategy"], entry["optim"]) == ("daft", ADAM):
            scores = grids.setdefault((entry["task"], entry["model"]), {})
            scores.setdefault(entry["rate"], []).append(entry["test"])
    losses: dict[str, list[float]] = {}
    for of, tested in grids.items():
        scores = {rate: float(np.mean(each)) for rate, each in tested.items()}
        fitted = HeadFit(heads[of]["curvature"], heads[of]["feature_spread"]).rate(ADAM)
        wanted = {"2e-4": 2e-4, "5e-4": 5e-4, "a tenth of the head's": fitted / 10, "a twentieth": fitted / 20}
        for name, rate in wanted.items():
            near = min(scores, key=lambda one, rate=rate: abs(math.log(one / rate)))
            losses.setdefault(name, []).append(max(scores.values()) - scores[near])
    rows = [(name, f"{np.mean(each):.3f}", f"{max(each):.3f}") for name, each in losses.items()]
    return markdown_table((f"rate of DAFT, {len(grids)} grids", "mean loss on test", "largest"), rows)


def stand_in(model: str) -> nn.Module:
    """A module of the network's family and with its kind of normalisation: what recommended rates depend on."""
    family, batch_norm = KINDS[model]
    made = nn.Sequential(nn.BatchNorm1d(1)) if batch_norm else nn.Sequential(nn.LayerNorm(1))
    made.config = SimpleNamespace(model_type=family)
    return made


def _default(runs: Sequence[Entry]) -> Entry:
    """The run of an AdamW grid whose rate is nearest to its strategy's default."""
    one = runs[0]
    if one["strategy"] == "linear_probe":
        heads = {tuple(entry["of"]): entry for entry in json.loads(HEADS.read_text(encoding="utf-8"))}
        fit = heads[one["task"], one["model"]]
        rate = HeadFit(fit["curvature"], fit["feature_spread"]).rate(ADAM)
    else:
        configs = resolve(STRATEGIES[one["strategy"]][0])
        rate = float(recommended_arguments(configs, ADAM, stand_in(one["model"]))["learning_rate"].value)
    return min((r for r in runs if r["optim"] == ADAM), key=lambda r: abs(math.log(r["rate"] / rate)))


def cautious(default: Entry, best: Entry) -> Entry:
    """The default, unless the best beats it on validation by more than one standard error of its accuracy."""
    score, images = max(best["curve"]), 200 if best["task"] == "caltech40" else 100
    return best if score - max(default["curve"]) > math.sqrt(score * (1 - score) / images) else default


def write_page() -> None:
    write_tables({"grids": grids(), "regrets": regrets(), "from head": from_head()})


def write_tables(tables: Mapping[str, str]) -> None:
    """Write tables between their markers in docs/rates.md."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- runs: {name} -->", "<!-- runs end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")


def look_at_heads(tasks: Sequence[Task], models: Sequence[str]) -> None:
    """What the fitted head rates are derived from, for each task and model."""
    known = json.loads(HEADS.read_text(encoding="utf-8")) if HEADS.is_file() else []
    found = {tuple(entry["of"]): entry for entry in known}
    for model in models:
        for task in (replace(task, pixels=OWN_PIXELS.get(model, task.pixels)) for task in tasks):
            bench = Bench(task, model)
            data, (loaded, _) = bench.ready.splits["train"], bench.load(1)
            samples = Samples(len(data), lambda rows, b=bench, d=data: dict(b.ready.collate(read_rows(d, rows))))  # type: ignore[misc]
            fit = fit_head(loaded, anatomy(loaded), samples)
            of = (task.name, model)
            found[of] = {"of": list(of), "curvature": fit.curvature, "feature_spread": fit.feature_spread}
    HEADS.write_text(json.dumps(list(found.values()), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="*", help="natural tasks: " + ", ".join(NEAR))
    parser.add_argument("--far", nargs="*", default=list(FAR), choices=list(FAR), help="built-in tasks")
    parser.add_argument("--models", nargs="+", default=[MOBILE, "efficientnet-lite0"])
    parser.add_argument("--strategies", nargs="+", default=["linear_probe", "full", "daft, one rate"])
    parser.add_argument("--optims", nargs="+", default=[SGD, ADAM])
    parser.add_argument("--rates", nargs="+", type=float, help="in place of the strategy's own grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--heads", action="store_true", help="only look at the heads")
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/rates.md")
    options = parser.parse_args()
    if options.page:
        return write_page()
    quiet()
    tasks = [Task(folder.name, NEAR[folder.name], folder) for folder in options.folder]
    tasks += [Task(name, FAR[name][1]) for name in options.far]
    if options.heads:
        return look_at_heads(tasks, options.models)
    runs = Runs(RESULTS, ("task", "model", "strategy", "optim", "rate", "seed"))
    for model in options.models:
        for task in (replace(task, pixels=OWN_PIXELS.get(model, task.pixels)) for task in tasks):
            bench: Bench | None = None
            for name, optim, rate, seed in wanted(options):

                def make(name: str = name, optim: str = optim, rate: float = rate, seed: int = seed) -> Entry:
                    nonlocal bench
                    bench = bench or Bench(task, model)  # noqa: B023
                    return bench.run(STRATEGIES[name][0], optim, rate, seed, **ARGUMENTS.get(name, {}))

                key = {"task": task.name, "model": model, "strategy": name, "optim": optim, "rate": rate, "seed": seed}
                runs.get(key, make)


if __name__ == "__main__":
    main()
