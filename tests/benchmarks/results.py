"""Strategies on real data, by `hf_ft.compare`: `python tests/benchmarks/results.py --natural FOLDER`.

FOLDER holds the image folders `caltech40` and `cifar10`, each with the splits train, validation and test, and
`imagenet1k_one_each`, the source data of soft fine-tuning: a folder per ImageNet class, in the order of their indices.
The tasks:

- `caltech40` (128 px, MobileNetV2), `caltech40_lite` (EfficientNet-Lite0), `caltech40_dinov2` (112 px, DINOv2-small):
  40 classes of Caltech-101, 10 images per class.
- `cifar10` (96 px, MobileNetV2): 20 images per class.
- Far from ImageNet (64 px, MobileNetV2), and without source data: `elpv_500` and `elpv_100`, monocrystalline solar
  cells, defective or not (out of distribution: polycrystalline ones); `mnist_200` and `uci_100`, digits of MNIST and of
  UCI (out of distribution: those of the other).
- `digits` (64 px): the digits 5 to 9 of MNIST, 10 images per class (out of distribution: UCI's), from a MobileNetV2
  that this script first trains on the digits 0 to 4, which are the source data as well.

Each of `--splits` draws training, validation and test images anew, with the same numbers per class. `--trials 0`
trains every strategy with its own defaults; otherwise, each is tuned with a budget of that many full fine-tuning runs.
AMCF trains the network together with EfficientNet-Lite0; "amcf (all layers)" trains the same two without its search,
and "plain ensemble" without its term as well. "full (statistics kept)" is full fine-tuning with BatchNorm's pretrained
statistics, and "soft (batch statistics)" is soft fine-tuning without them; both are among the trials if a strategy is
tuned. Others likewise.

Prints an estimate. It may be stopped and started again, or started in several terminals, which then share the work. The
results of every training run are in docs/results/; strategies that a stored comparison lacks are added to it.
`python -m docs.tools.tables` generates the tables of docs/results.md from them.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import cells, digits, quiet
from datasets import DatasetDict, concatenate_datasets

from hf_ft import AMCFConfig
from hf_ft.cli import main as hf_ft
from hf_ft.comparison import Data, Settings
from hf_ft.comparison.prepare import prepare_comparison
from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import standings
from hf_ft.core.config import BASELINE, config_class
from hf_ft.data.columns import find_columns
from hf_ft.data.load import load_split, load_splits
from hf_ft.splits import stratified_split
from hf_ft.zoo.datasets import DATA_NOTICES, mnist5k, uci_digits

ROOT = Path(__file__).parents[2]
WORK, KEPT = ROOT / "runs" / "results", ROOT / "docs" / "results"
MOBILE, LITE, DINO = "mobilenet_v2", "efficientnet-lite0", "dinov2-small"
LOW_DIGITS = WORK / "digits_source"  # the network trained on the digits 0 to 4
# DINOv2 has neither BatchNorm nor a pretrained head, and no other model to work with.
NEEDS_MORE = ("daft", "soft", "daft+l2_sp", "daft+tred", "amcf", "amcf (all layers)", "plain ensemble")
ALL = (
    "linear_probe,lp_ft,peft,l2_sp,delta,blockwise,daft,soft,tred,daft+l2_sp,daft+tred,amcf,amcf (all layers),"
    "plain ensemble"
)
MODES = {" (statistics kept)": "eval", " (batch statistics)": "auto"}  # of BatchNorm, by the end of a name
SOURCE = "imagenet1k_one_each"


@dataclass(frozen=True)
class Task:
    """A task.

    ``sizes``: images for training, validation and test; ``without``: strategies that do not apply to it; ``bf16``:
    mixed precision, where it is faster and scores the same (docs/performance.md); ``batch``: its size, so that no last
    batch of an epoch is small, because BatchNorm's statistics of three images are noise.
    """

    title: str
    sizes: tuple[int, int, int]
    pixels: int
    epochs: int
    model: str = MOBILE
    without: tuple[str, ...] = ()
    bf16: bool = False
    batch: int = 32


CALTECH = "Caltech-101, 40 classes, 10 images a class"
TASKS = {
    "cifar10": Task("CIFAR-10, 20 images a class", (200, 100, 600), 96, 12),
    "caltech40": Task(CALTECH, (400, 200, 640), 128, 12),
    "caltech40_lite": Task(CALTECH, (400, 200, 640), 128, 12, LITE),
    "caltech40_dinov2": Task(CALTECH, (400, 200, 640), 112, 12, DINO, NEEDS_MORE, True),
    "elpv_500": Task("ELPV solar cells, 500 images", (350, 150, 400), 64, 8),
    "mnist_200": Task("MNIST, 200 images", (140, 60, 400), 64, 15),
    "elpv_100": Task("ELPV solar cells, 100 images", (100, 100, 400), 64, 25, batch=25),
    "uci_100": Task("UCI digits, 100 images", (100, 100, 400), 64, 25, batch=25),
    "digits": Task("MNIST digits 0-4 -> 5-9, 10 a class", (50, 150, 400), 64, 30, str(LOW_DIGITS), batch=25),
}


def natural(folder: Path, name: str, task: Task, split: int) -> Data:
    """A task with images in a folder; all of them are split anew."""
    whole = concatenate_datasets(list(load_splits(str(folder / name.partition("_")[0])).values()))
    source = load_split(str(folder / SOURCE))
    columns = find_columns(whole)
    return Data(
        stratified_split(whole, *task.sizes, seed=split, by=columns.label),
        columns,
        name=task.title,
        source=source,
        source_columns=find_columns(source),
    )


def far(name: str, task: Task, split: int) -> Data:
    """A task from a built-in dataset."""
    of = name.partition("_")[0]
    own, other = {
        "elpv": lambda: (cells("mono"), cells("poly")),
        "mnist": lambda: (mnist5k(), uci_digits()),
        "uci": lambda: (uci_digits(), mnist5k()),
        "digits": lambda: (digits(mnist5k(), 5, 9), digits(uci_digits(), 5, 9)),
    }[of]()
    splits = stratified_split(own, *task.sizes, seed=split)
    splits["ood"] = stratified_split(other, task.sizes[2], 0, 0, seed=split)["train"]
    source = digits(mnist5k(), 0, 4) if of == "digits" else None
    return Data(
        splits,
        find_columns(splits["train"]),
        name=task.title,
        source=source,
        source_columns=None if source is None else find_columns(source),
        notices=(DATA_NOTICES[{"elpv": "elpv", "uci": "uci_digits"}.get(of, "mnist5k")],),
    )


def trained_on_low_digits() -> None:
    """Train the network of `digits` on MNIST's digits 0 to 4 by `hf-ft train`, unless that is done."""
    if (LOW_DIGITS / "config.json").is_file():
        return
    rows = LOW_DIGITS.with_name("digits_source_data")
    DatasetDict({"train": digits(mnist5k(), 0, 4)}).save_to_disk(str(rows))
    flags = {
        "model": MOBILE,
        "dataset": rows,
        "image_size": 64,
        "augment": "none",
        "num_train_epochs": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "output_dir": LOW_DIGITS,
        "overwrite": True,
    }
    if hf_ft(["train", *(f"--{key}={value}" for key, value in flags.items())]):
        raise SystemExit("the source network was not trained")


def who_takes_part(names: str, task: Task) -> dict[str, Any]:
    """Strategies by name, without those that cannot run with the task's model."""
    both = (_recorded(task.model), LITE)
    made: dict[str, Any] = {
        "amcf": AMCFConfig(source_models=both),
        "amcf (all layers)": AMCFConfig(source_models=both, frozen=(0, 0)),
        "plain ensemble": AMCFConfig(source_models=both, frozen=(0, 0), consistency=0.0),
    }
    for name in names.split(","):
        for suffix, mode in MODES.items():
            if name.endswith(suffix):
                made[name] = config_class(name.removesuffix(suffix))(norm_mode=mode)
    return {name: made.get(name, name) for name in names.split(",") if name not in task.without}


def _recorded(model: str) -> str:
    """A model as the results name it: a folder relative to the current one, since results are shared."""
    return os.path.relpath(model) if Path(model).is_absolute() else model


def with_winner(results: Results) -> Results:
    """Results with the winner among all strategies, whenever they were added, and the seed that is its best."""
    first = standings(results)[0].contender
    best = max(first.finished_runs, key=lambda run: run.validation or 0.0)
    same = (first.name, best.seed) == (results.winner, results.winner_seed)
    return replace(results, winner=first.name, winner_seed=best.seed, mistakes=results.mistakes if same else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--natural", type=Path, help="the folder of the natural images")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--splits", default="0,1,2")
    parser.add_argument("--strategies", default=ALL, help="in addition to full fine-tuning")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2, help="per split")
    parser.add_argument("--hours", type=float, default=2.5, help="limit for this call; the next one continues")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--warmup", type=float, help="share of the steps, instead of what is recommended")
    parser.add_argument("--epochs", type=int, help="instead of the task's, to try the script")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--kept", type=Path, default=KEPT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()
    kind = "tuned" if options.trials else "defaults"
    end = time.monotonic() + 3600 * options.hours
    for name in options.tasks.split(","):
        task = TASKS[name]
        for split in map(int, options.splits.split(",")):
            kept = options.kept / kind / f"{name}_{split}.json"
            earlier = Results.load(kept) if kept.is_file() else None
            known = {contender.name for contender in earlier.contenders} if earlier else set()
            wanted = {
                name: made for name, made in who_takes_part(options.strategies, task).items() if name not in known
            }
            if not wanted:
                continue
            if task.model == str(LOW_DIGITS):
                trained_on_low_digits()
            data = far(name, task, split) if task.pixels == 64 else natural(options.natural, name, task, split)
            prepared = prepare_comparison(
                _recorded(task.model),
                data,
                wanted,
                output_dir=options.work / kind / f"{name}_{split}",
                settings=Settings(options.trials, options.seeds, hours=max(1e-3, (end - time.monotonic()) / 3600)),
                image_size=task.pixels,
                num_train_epochs=options.epochs or task.epochs,
                per_device_train_batch_size=task.batch,
                **({} if options.warmup is None else {"warmup_steps": options.warmup}),
                **({"bf16": True, "use_cpu": not torch.cuda.is_available()} if task.bf16 else {}),
                tell=lambda line: print(line, flush=True),
            )
            print(f"{name}, split {split}: {prepared.estimate()}", flush=True)
            known_baseline = BASELINE in known
            prepared.runner.run(only=wanted if known_baseline else None)
            # The advice is only recorded afterwards: here every strategy is run.
            advice = prepared.advised()
            command = f"python tests/benchmarks/results.py --natural FOLDER --tasks {name} --splits {split}"
            results = prepared.finish(command + (" --trials 0" if not options.trials else ""), advice)
            ran = [one for one in results.contenders if one.name in wanted or not known_baseline]
            if any(contender.status in ("unfinished", "not reached") for contender in ran):
                print("the time limit was reached: start it again to continue", flush=True)
                return
            kept.parent.mkdir(parents=True, exist_ok=True)
            if earlier is not None:
                results = with_winner(replace(earlier, contenders=(*earlier.contenders, *ran)))
            results.save(kept)
            print(f"{name}, split {split}: {len(results.contenders)} strategies", flush=True)


if __name__ == "__main__":
    main()
