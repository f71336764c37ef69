"""What makes a method gain or not, one factor at a time: `python tests/benchmarks/one_factor.py --natural FOLDER`.

On the tasks and splits of results.py, two seeds each, with AdamW unless said; the scores are those of the last epoch.

- `blockwise`: what the block starts from. The last block alone (`block="last_quarter"`), at the learning rate
  recommended for it: as it is; with the pretrained BatchNorm statistics kept, also at a lower rate and with a warm-up;
  with BatchNorm converted to the target's statistics (DAFT); and with the zero head of DAFT as well.
- `soft`: soft fine-tuning with one image of each ImageNet class, or the digits 0 to 4, as its source data: with batch
  statistics; with one forward pass each for the two batches; with the pretrained statistics kept, at several learning
  rates; with converted BatchNorm; with other weights and times; and without source data. Beside them, the same without
  soft fine-tuning.
- `lp_ft`: LP-FT, whose second stage keeps the statistics, with and without a warm-up of each stage.
- `tred`: the weight of the distance from the disentangled features; the same without disentangling; and with the
  pretrained statistics kept.
- `amcf`: MobileNetV2 and EfficientNet-Lite0 together, without the search: AMCF's term, the optimizer, the pretrained
  statistics kept, and layers that stay frozen. Beside them, each network alone.

Runs are kept in tests/benchmarks/results/one_factor.jsonl; those that are already there are not repeated. The tables
are written into the pages of these methods in docs/methods, where there is a place for one (with `--page` only that).
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import Entry, Runs, quiet
from rates import ADAM, SGD, Bench, stand_in
from rates import Task as Images
from results import LITE, MOBILE, TASKS, far, natural, trained_on_low_digits

from hf_ft import (
    AMCFConfig,
    BlockwiseConfig,
    DAFTConfig,
    FTConfig,
    FullConfig,
    LPFTConfig,
    SoftConfig,
    TREDConfig,
)
from hf_ft.core.compose import recommended_arguments
from hf_ft.data.task import Data

RESULTS = Path(__file__).parent / "results" / "one_factor.jsonl"
PAGES = Path(__file__).parents[2] / "docs" / "methods"
LAST, SOFT = BlockwiseConfig(block="last_quarter"), SoftConfig(norm_mode="auto")
KEPT_FULL, KEPT_SOFT = FullConfig(norm_mode="eval"), SoftConfig()
TERM = AMCFConfig(frozen=(0, 0), norm_mode="auto")  # AMCF without its search, and the same without its term
PLAIN, KEPT_TERM = replace(TERM, consistency=0.0), replace(TERM, norm_mode="eval")
KEPT_PLAIN = replace(KEPT_TERM, consistency=0.0)
BOTH = (MOBILE, LITE)
TITLES = {
    "cifar10": "CIFAR-10",
    "caltech40": "Caltech-101",
    "mnist_200": "MNIST",
    "elpv_500": "ELPV solar cells",
    "digits": "MNIST's digits 5 to 9",
}
SPLITS, SEEDS = (0, 1, 2), (1, 2)


class Variant(NamedTuple):
    """Strategies, the learning rate (``None``: the recommended one) and the share of the run that warms it up.

    Without ``model``, the task's own; several are an ensemble.
    """

    configs: list[FTConfig]
    rate: float | None = None
    warmup: float = 0.0
    optim: str = ADAM
    model: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class Study:
    """Variants of a method, the first of which is the one that the others are compared with.

    Args:
        what: the first column of the table.
        rate_of: the strategies whose recommended learning rate all variants use; ``None`` for each its own.
    """

    what: str
    variants: Mapping[str, Variant]
    tasks: tuple[str, ...]
    rate_of: list[FTConfig] | None = None

    @property
    def needs_source(self) -> bool:
        return any(one.needs().source_data == "required" for made in self.variants.values() for one in made.configs)

    def rate(self, variant: Variant) -> float:
        if variant.rate is not None:
            return variant.rate
        wanted = recommended_arguments(self.rate_of or variant.configs, variant.optim, stand_in(MOBILE))
        return float(wanted["learning_rate"].value)


STUDIES = {
    "blockwise": Study(
        "the block starts",
        {
            "pretrained": Variant([LAST]),
            "statistics kept": Variant([replace(LAST, norm_mode="eval")]),
            "statistics kept, warm-up, 2e-4": Variant([replace(LAST, norm_mode="eval")], 2e-4, 0.1),
            "converted": Variant([LAST, DAFTConfig(zero_head=False)]),
            "converted, zero head": Variant([LAST, DAFTConfig()]),
        },
        ("cifar10", "caltech40", "mnist_200", "elpv_500"),
        [LAST],
    ),
    "soft": Study(
        "variant",
        {
            "full": Variant([FullConfig()]),
            "soft": Variant([SOFT]),
            "full, statistics kept": Variant([KEPT_FULL], 1e-4),
            "soft, statistics kept": Variant([KEPT_SOFT], 1e-4),
            "full, statistics kept, warm-up": Variant([KEPT_FULL], 1e-4, 0.1),
            "full, statistics kept, warm-up, twice the rate": Variant([KEPT_FULL], 2e-4, 0.1),
            "soft, statistics kept, warm-up, twice the rate": Variant([KEPT_SOFT], 2e-4, 0.1),
            "daft": Variant([DAFTConfig()], 2e-4),
            "daft+soft": Variant([DAFTConfig(), SOFT], 2e-4),
            "soft, source_forward='separate'": Variant([replace(SOFT, source_forward="separate")]),
            "soft, until=1": Variant([replace(SOFT, until=1.0)]),
            "soft, weight=0.3": Variant([replace(SOFT, weight=0.3)]),
            "soft, weight=3": Variant([replace(SOFT, weight=3.0)]),
            "soft, source='head'": Variant([replace(SOFT, source="head")]),
            "soft, source='head', statistics kept, warm-up, twice the rate": Variant(
                [replace(KEPT_SOFT, source="head")], 2e-4, 0.1
            ),
        },
        ("cifar10", "caltech40", "digits"),
        [FullConfig()],
    ),
    "lp_ft": Study(
        "variant",
        {
            "lp_ft, 1e-4": Variant([LPFTConfig()], 1e-4),
            "lp_ft, warm-up, 1e-4": Variant([LPFTConfig()], 1e-4, 0.1),
            "lp_ft, warm-up, 2e-4": Variant([LPFTConfig()], 2e-4, 0.1),
            "lp_ft, warm-up, 3e-4": Variant([LPFTConfig()], 3e-4, 0.1),
            "lp_ft, batch statistics, 3e-4": Variant([LPFTConfig(norm_mode="auto")], 3e-4),
        },
        ("cifar10",),
    ),
    "tred": Study(
        "variant",
        {
            "full": Variant([FullConfig()]),
            "full, statistics kept": Variant([KEPT_FULL], warmup=0.1),
            "tred": Variant([TREDConfig()]),
            "tred, statistics kept": Variant([TREDConfig(norm_mode="eval")], warmup=0.1),
            "tred, alpha=0.003": Variant([TREDConfig(alpha=0.003)]),
            "tred, alpha=0.01": Variant([TREDConfig(alpha=0.01)]),
            "tred, alpha=0.03": Variant([TREDConfig(alpha=0.03)]),
            "tred, criterion='none'": Variant([TREDConfig(criterion="none")]),
            "tred, criterion='none', alpha=0.01": Variant([TREDConfig(criterion="none", alpha=0.01)]),
        },
        ("cifar10", "caltech40", "mnist_200", "elpv_500"),
    ),
    "amcf": Study(
        "variant",
        {
            "plain ensemble, SGD, 0.01": Variant([PLAIN], 0.01, optim=SGD, model=BOTH),
            "its term, SGD, 0.01": Variant([TERM], 0.01, optim=SGD, model=BOTH),
            "20 layers frozen, SGD, 0.01": Variant([replace(TERM, frozen=(20, 20))], 0.01, optim=SGD, model=BOTH),
            "its term, AdamW, 3e-4": Variant([TERM], 3e-4, model=BOTH),
            "its term, statistics kept, SGD, 3e-4": Variant([KEPT_TERM], 3e-4, optim=SGD, model=BOTH),
            "its term, statistics kept, AdamW, 2e-4": Variant([KEPT_TERM], 2e-4, 0.1, model=BOTH),
            "20 layers frozen, statistics kept, AdamW, 2e-4": Variant(
                [replace(KEPT_TERM, frozen=(20, 20))], 2e-4, 0.1, model=BOTH
            ),
            "plain ensemble, statistics kept, AdamW, 2e-4": Variant([KEPT_PLAIN], 2e-4, 0.1, model=BOTH),
            "MobileNetV2 alone, statistics kept, AdamW, 2e-4": Variant([KEPT_FULL], 2e-4, 0.1),
            "EfficientNet-Lite0 alone, statistics kept, AdamW, 2e-4": Variant([KEPT_FULL], 2e-4, 0.1, model=LITE),
        },
        ("cifar10", "caltech40", "mnist_200", "elpv_500"),
    ),
}


@dataclass(frozen=True)
class Split(Images):
    """A task and split of results.py, with or without its source data; ``folder`` holds the natural images."""

    split: int = 0
    with_source: bool = False

    @cached_property
    def data(self) -> Data:
        task = TASKS[self.name]
        if task.pixels == 64:
            data = far(self.name, task, self.split)
        else:
            assert self.folder is not None, "--natural FOLDER"
            data = natural(self.folder, self.name, task, self.split)
        return data if self.with_source else replace(data, source=None, source_columns=None)


def table(study: Study, entries: list[Entry]) -> str:
    """Test scores by task, and the difference from the first variant, paired by split and seed.

    A variant that was not run on all splits is left out.
    """
    scores = {tuple(entry[name] for name in ("variant", "task", "split", "seed")): entry["test"] for entry in entries}
    keys = {(name, task): [key for key in scores if key[:2] == (name, task)] for name, task, *_ in scores}
    keys = {of: found for of, found in keys.items() if len(found) == len(SPLITS) * len(SEEDS)}
    base = next(iter(study.variants))
    tasks = [task for task in study.tasks if any(of[1] == task for of in keys)]
    lines = [f"| {study.what} | {' | '.join(TITLES[task] for task in tasks)} |", f"| --- {'| --- ' * len(tasks)}|"]
    for variant in study.variants:
        cells = []
        for task in tasks:
            found = keys.get((variant, task))
            if not found:
                cells.append("")
                continue
            gain = ""
            if variant != base and (base, task) in keys:
                gains = [scores[key] - scores[base, *key[1:]] for key in found]
                gain = f" ({np.mean(gains):+.3f} ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.3f})"
            cells.append(f"{np.mean([scores[key] for key in found]):.3f}{gain}".replace("-", "−"))
        if any(cells):
            lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(name: str, entries: list[Entry]) -> None:
    """Write the table between its markers on the method's page; if there are none, print it."""
    page, made = PAGES / f"{name}.md", table(STUDIES[name], entries)
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- runs: one factor -->")
    if not begin:
        return print(made)
    rest = rest.partition(end := "<!-- runs end -->")[2]
    page.write_text(f"{before}{begin}\n\n{made}\n\n{end}{rest}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--natural", type=Path, help="the folder of the natural images")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES))
    parser.add_argument("--tasks", nargs="+", help="instead of all of a study")
    parser.add_argument("--splits", nargs="+", type=int, default=SPLITS)
    parser.add_argument("--variants", nargs="+", help="instead of all of a study")
    parser.add_argument("--page", action="store_true", help="only write the tables of the pages")
    options = parser.parse_args()
    runs = Runs(RESULTS, ("study", "task", "split", "variant", "seed"))
    for name in options.studies:
        study = STUDIES[name]
        if not options.page:
            quiet()
            for task in options.tasks or study.tasks:
                if task == "digits":
                    trained_on_low_digits()
                for split in options.splits:
                    images = Split(task, TASKS[task].pixels, options.natural, split, study.needs_source)
                    run_split(runs, name, images, options.variants)
        entries = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
        write(name, [entry for entry in entries if entry["study"] == name])


def run_split(runs: Runs, name: str, images: Split, variants: list[str] | None) -> None:
    study, task = STUDIES[name], TASKS[images.name]
    bench = functools.cache(partial(Bench, images))  # for a model, prepared once there is something to run

    def train(entry: Entry) -> Entry:
        variant = study.variants[entry["variant"]]
        more = {"num_train_epochs": task.epochs, "per_device_train_batch_size": task.batch}
        more |= {"warmup_steps": variant.warmup} if variant.warmup else {}
        made = bench(variant.model or task.model)
        return made.run(variant.configs, variant.optim, study.rate(variant), entry["seed"], **more)

    for variant in variants or study.variants:
        for seed in SEEDS:
            entry = {"study": name, "task": images.name, "split": images.split, "variant": variant, "seed": seed}
            runs.get(entry, partial(train, entry))


if __name__ == "__main__":
    main()
