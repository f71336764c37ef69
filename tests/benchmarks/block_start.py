"""What a block should start from: `python tests/benchmarks/block_start.py --natural FOLDER`.

The last block alone is fine-tuned (`BlockwiseConfig(block="last_quarter")`), at the recommended learning rate for
AdamW, on the tasks and splits of results.py, two seeds each: as it is; with the pretrained BatchNorm statistics kept;
with BatchNorm converted to the target's statistics (DAFT); and with the zero head of DAFT as well. The scores are those
of the last epoch. Runs are kept in tests/benchmarks/results/block_start.jsonl; those that are already there are not
repeated. Their table is written into docs/methods/blockwise.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from common import Entry, Runs, quiet
from rates import ADAM, Bench, stand_in
from rates import Task as Images
from results import MOBILE, TASKS, far, natural

from hf_ft import BlockwiseConfig, DAFTConfig, FTConfig
from hf_ft.core.compose import recommended_arguments
from hf_ft.data.task import Data

RESULTS = Path(__file__).parent / "results" / "block_start.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "methods" / "blockwise.md"
LAST = BlockwiseConfig(block="last_quarter")
STARTS: dict[str, list[FTConfig]] = {
    "pretrained": [LAST],
    "statistics kept": [replace(LAST, norm_mode="eval")],
    "converted": [LAST, DAFTConfig(zero_head=False)],
    "converted, zero head": [LAST, DAFTConfig()],
}
TITLES = {"cifar10": "CIFAR-10", "caltech40": "Caltech-101", "mnist_200": "MNIST", "elpv_500": "ELPV solar cells"}
SEEDS = (1, 2)


@dataclass(frozen=True)
class Split(Images):
    """A task and split of results.py; ``folder`` holds the natural images."""

    split: int = 0

    @cached_property
    def data(self) -> Data:
        task = TASKS[self.name]
        if task.pixels == 64:
            return far(self.name, task, self.split)
        assert self.folder is not None, "--natural FOLDER"
        return replace(natural(self.folder, self.name, task, self.split), source=None, source_columns=None)


def table(entries: list[Entry]) -> str:
    """Test scores by task, and the difference from the pretrained start, paired by split and seed."""
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    scores = {tuple(entry[name] for name in ("start", "task", "split", "seed")): entry["test"] for entry in entries}
    lines = [f"| the block starts | {' | '.join(TITLES[task] for task in tasks)} |", f"| --- {'| --- ' * len(tasks)}|"]
    for start in STARTS:
        cells = []
        for task in tasks:
            found = [key for key in scores if key[:2] == (start, task)]
            values = [scores[key] for key in found]
            gains = [scores[key] - scores["pretrained", *key[1:]] for key in found]
            error = np.std(gains, ddof=1) / len(gains) ** 0.5
            gain = f" ({np.mean(gains):+.3f} ± {error:.3f})" if start != "pretrained" else ""
            cells.append(f"{np.mean(values):.3f}{gain}".replace("-", "−"))
        lines.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--natural", type=Path, help="the folder of the natural images")
    parser.add_argument("--tasks", nargs="+", default=["cifar10", "caltech40", "mnist_200", "elpv_500"])
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--page", action="store_true", help="only write the table of the page")
    options = parser.parse_args()
    if not options.page:
        quiet()
        rate = recommended_arguments([LAST], ADAM, stand_in(MOBILE))["learning_rate"].value
        runs = Runs(RESULTS, ("task", "split", "start", "seed"))
        for name in options.tasks:
            for split in options.splits:
                bench: Bench | None = None
                for start, configs in STARTS.items():
                    for seed in SEEDS:

                        def make(configs: list[FTConfig] = configs, seed: int = seed) -> Entry:
                            nonlocal bench
                            bench = bench or Bench(Split(name, TASKS[name].pixels, options.natural, split), MOBILE)  # noqa: B023
                            epochs = TASKS[name].epochs  # noqa: B023
                            return bench.run(configs, ADAM, rate, seed, num_train_epochs=epochs)

                        runs.get({"task": name, "split": split, "start": start, "seed": seed}, make)
    entries = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    before, rest = PAGE.read_text(encoding="utf-8").split(begin := "<!-- runs: starts -->")
    rest = rest.partition(end := "<!-- runs end -->")[2]
    PAGE.write_text(f"{before}{begin}\n\n{table(entries)}\n\n{end}{rest}", encoding="utf-8")


if __name__ == "__main__":
    main()
