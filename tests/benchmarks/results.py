"""Every strategy on real data, by `hf_ft.compare`: `python tests/benchmarks/results.py`.

Five tasks at 64 px, of which two are compared in full and three with the five systems and four baselines:

- `digits` (in full): MNIST's digits 0 to 4 -> 5 to 9, 10 images a class. The source network is a MobileNetV2 that this
  script first trains on the digits 0 to 4, which are the source data as well. Out of distribution: UCI's digits.
- `elpv_100` (in full), `elpv_500`: so many monocrystalline solar cells, defective or not, from an ImageNet MobileNetV2.
  Out of distribution: polycrystalline cells.
- `mnist_200`: 200 images of MNIST; out of distribution: UCI's digits.
- `uci_100`: 100 images of UCI's digits; out of distribution: MNIST.

`elpv_100_norms` and `elpv_500_norms` are the same data again, for what differs between full fine-tuning's space and the
others': there every strategy may choose to keep BatchNorm's statistics (`full+l2_sp` is L2-SP with full's `norm_mode`).

The number of images is that of all labelled ones: three tenths of them are validation, which alone chooses. AMCF trains
that network beside an ImageNet EfficientNet-Lite0; "plain ensemble" trains the same two without AMCF's term and search.

Prints an estimate, and may be stopped and started again, or started in several terminals, which then share the work.
What every training gave is in docs/results/; `python -m docs.tools.tables` makes docs/results.md from that.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import PIXELS, cells, digits, quiet
from datasets import Dataset, DatasetDict

from hf_ft import AMCFConfig, DAFTConfig
from hf_ft.cli import main as hf_ft
from hf_ft.comparison import Data, Settings
from hf_ft.comparison.prepare import prepare_comparison
from hf_ft.core.config import strategies
from hf_ft.data.columns import find_columns
from hf_ft.splits import stratified_split
from hf_ft.zoo.datasets import DATA_NOTICES, mnist5k, uci_digits

ROOT = Path(__file__).parents[2]
WORK, KEPT = ROOT / "runs" / "results", ROOT / "docs" / "results"
TESTED = 400  # images of each test set
NINE = ("full", "linear_probe", "lp_ft", "l2_sp", "blockwise", "daft", "soft", "tred")
SECOND = "efficientnet-lite0"
NORMS = ("full", "full+l2_sp", "full+soft", "full+tred")


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        labelled: images with labels, for training and validation.
        epochs: of each training.
        batch: its size, so that no last batch of an epoch is small: BatchNorm's statistics of three images are noise.
        who: ``every`` strategy, the ``nine``, or those with ``norms`` that are tuned.
        data: ``elpv``, ``mnist5k`` or ``uci_digits``, for its licence.
    """

    title: str
    labelled: int
    epochs: int
    batch: int
    who: str
    data: str


TASKS = {
    "digits": Task("MNIST digits 0-4 -> 5-9, 10 a class", 50, 30, 18, "every", "mnist5k"),
    "elpv_100": Task("ELPV solar cells, 100 images", 100, 25, 24, "every", "elpv"),
    "uci_100": Task("UCI digits, 100 images", 100, 25, 24, "nine", "uci_digits"),
    "mnist_200": Task("MNIST, 200 images", 200, 15, 28, "nine", "mnist5k"),
    "elpv_500": Task("ELPV solar cells, 500 images", 500, 8, 32, "nine", "elpv"),
    "elpv_100_norms": Task("ELPV solar cells, 100 images", 100, 25, 24, "norms", "elpv"),
    "elpv_500_norms": Task("ELPV solar cells, 500 images", 500, 8, 32, "norms", "elpv"),
}


def rows(name: str) -> tuple[Dataset, Dataset]:
    """The data of a task, and those out of distribution."""
    if name.startswith("elpv"):
        return cells("mono"), cells("poly")
    if name == "digits":
        return digits(mnist5k(), 5, 9), digits(uci_digits(), 5, 9)
    pair = (mnist5k(), uci_digits())
    return pair if name.startswith("mnist") else pair[::-1]


def data(name: str) -> Data:
    """Splits, drawn with seed 0 and the shares of the classes."""
    task, (own, other) = TASKS[name], rows(name)
    held_out = round(0.3 * task.labelled)
    splits = stratified_split(own, task.labelled - held_out, held_out, TESTED)
    splits["ood"] = stratified_split(other, TESTED, 0, 0)["train"]
    source = digits(mnist5k(), 0, 4) if name == "digits" else None
    return Data(
        DatasetDict(splits),
        find_columns(splits["train"]),
        name=task.title,
        source=source,
        source_columns=None if source is None else find_columns(source),
        notices=(DATA_NOTICES[task.data],),
    )


def source_network(work: Path) -> str:
    """The network trained on the digits 0 to 4 by `hf-ft train`; made where it is missing."""
    made = work / "digits_source"
    if not (made / "config.json").is_file():
        rows = work / "digits_source_data"
        DatasetDict({"train": digits(mnist5k(), 0, 4)}).save_to_disk(str(rows))
        flags = {
            "model": "mobilenet_v2",
            "dataset": rows,
            "image_size": PIXELS,
            "augment": "none",
            "num_train_epochs": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "output_dir": made,
            "overwrite": True,
        }
        if hf_ft(["train", *(f"--{key}={value}" for key, value in flags.items())]):
            raise SystemExit("the source network was not trained")
    return os.path.relpath(made)  # it is told in the results


def who_takes_part(task: Task, model: str) -> dict[str, Any]:
    """Strategies by name."""
    if task.who == "norms":
        still = DAFTConfig(norm_mode="eval")
        return {**{name: name for name in NORMS}, "daft": "daft", "daft, norm_mode eval": still}
    chosen = [name for name in (strategies() if task.who == "every" else NINE) if name != "amcf"]
    both = (model, SECOND)
    return {
        **{name: name for name in chosen},
        "amcf": AMCFConfig(source_models=both),
        "plain ensemble": AMCFConfig(source_models=both, frozen=(0, 0), consistency=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=2.5, help="of this sitting; the next one goes on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--epochs", type=int, help="other than the task's, to try the script")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--kept", type=Path, default=KEPT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()
    end = time.monotonic() + 3600 * options.hours
    for name in options.tasks.split(","):
        task = TASKS[name]
        model = source_network(options.work) if name == "digits" else "mobilenet_v2"
        prepared = prepare_comparison(
            model,
            data(name),
            who_takes_part(task, model),
            output_dir=options.work / name,
            settings=Settings(trials=options.trials, seeds=options.seeds, hours=(end - time.monotonic()) / 3600),
            image_size=PIXELS,
            num_train_epochs=options.epochs or task.epochs,
            per_device_train_batch_size=task.batch,
            tell=lambda line: print(line, flush=True),
        )
        print(f"{name}: {prepared.estimate()}", flush=True)
        prepared.runner.run()
        # What would have been advised is looked at afterwards: here every strategy has its turn.
        advice = prepared.advised()
        results = prepared.finish(f"python tests/benchmarks/results.py --tasks {name}", advice)
        if any(contender.status in ("unfinished", "not reached") for contender in results.contenders):
            print("the time of this sitting is up: start it again to go on", flush=True)
            return
        options.kept.mkdir(parents=True, exist_ok=True)
        results.save(options.kept / f"{name}.json")
        print(f"{name}: {results.winner} won by validation", flush=True)


if __name__ == "__main__":
    main()
