"""Strategies on real data, by `hf_ft.compare`: `python tests/benchmarks/results.py --natural FOLDER`.

FOLDER holds the image folders `caltech40` and `cifar10`, each with the splits train, validation and test, and
`imagenet1k_one_each`, the source data of soft fine-tuning: a folder per ImageNet class, in the order of their indices.
The tasks:

- `caltech40` (128 px, MobileNetV2), `caltech40_lite` (EfficientNet-Lite0), `caltech40_dinov2` (112 px, DINOv2-small):
  40 classes of Caltech-101, 10 images per class.
- `cifar10` (96 px, MobileNetV2): 20 images per class.
- `elpv_500`: 500 monocrystalline solar cells, defective or not; `mnist_200`: digits (64 px, MobileNetV2); far from
  ImageNet, and without source data. Out of distribution: polycrystalline cells; UCI's digits.

Each of `--splits` draws training, validation and test images anew, with the same numbers per class. `--trials 0` trains
every strategy with its own defaults; otherwise, each is tuned with a budget of that many full fine-tuning runs. AMCF
trains MobileNetV2 together with EfficientNet-Lite0; "plain ensemble" trains the same two without AMCF's term and
search.

Prints an estimate. It may be stopped and started again, or started in several terminals, which then share the work. The
results of every training run are in docs/results/; strategies that a stored comparison lacks are added to it.
`python -m docs.tools.tables` generates the tables of docs/results.md from them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import cells, quiet
from datasets import concatenate_datasets

from hf_ft import AMCFConfig
from hf_ft.comparison import Data, Settings
from hf_ft.comparison.prepare import prepare_comparison
from hf_ft.comparison.results import Results
from hf_ft.data.columns import find_columns
from hf_ft.data.load import load_split, load_splits
from hf_ft.splits import stratified_split
from hf_ft.zoo.datasets import DATA_NOTICES, mnist5k, uci_digits

ROOT = Path(__file__).parents[2]
WORK, KEPT = ROOT / "runs" / "results", ROOT / "docs" / "results"
MOBILE, LITE, DINO = "mobilenet_v2", "efficientnet-lite0", "dinov2-small"
# DINOv2 has neither BatchNorm nor a pretrained head, and no other model to work with.
NEEDS_MORE = ("daft", "soft", "daft+l2_sp", "daft+tred", "amcf", "plain ensemble")
ALL = "linear_probe,lp_ft,peft,l2_sp,delta,blockwise,daft,soft,tred,daft+l2_sp,daft+tred,amcf,plain ensemble"
SOURCE = "imagenet1k_one_each"


@dataclass(frozen=True)
class Task:
    """A task; ``sizes``: images for training, validation and test; ``without``: what does not apply to it."""

    title: str
    sizes: tuple[int, int, int]
    pixels: int
    epochs: int
    model: str = MOBILE
    without: tuple[str, ...] = ()


TASKS = {
    "cifar10": Task("CIFAR-10, 20 images a class", (200, 100, 600), 96, 12),
    "caltech40": Task("Caltech-101, 40 classes, 10 images a class", (400, 200, 640), 128, 12),
    "caltech40_lite": Task("Caltech-101, 40 classes, 10 images a class", (400, 200, 640), 128, 12, LITE),
    "caltech40_dinov2": Task("Caltech-101, 40 classes, 10 images a class", (400, 200, 640), 112, 12, DINO, NEEDS_MORE),
    "elpv_500": Task("ELPV solar cells, 500 images", (350, 150, 400), 64, 8),
    "mnist_200": Task("MNIST, 200 images", (140, 60, 400), 64, 15),
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
    elpv = name.startswith("elpv")
    own, other = (cells("mono"), cells("poly")) if elpv else (mnist5k(), uci_digits())
    splits = stratified_split(own, *task.sizes, seed=split)
    splits["ood"] = stratified_split(other, task.sizes[2], 0, 0, seed=split)["train"]
    notice = DATA_NOTICES["elpv" if elpv else "mnist5k"]
    return Data(splits, find_columns(splits["train"]), name=task.title, notices=(notice,))


def who_takes_part(names: str, task: Task) -> dict[str, Any]:
    """Strategies by name, without those that cannot run with the task's model."""
    both = (MOBILE, LITE)
    made = {
        "amcf": AMCFConfig(source_models=both),
        "plain ensemble": AMCFConfig(source_models=both, frozen=(0, 0), consistency=0.0),
    }
    return {name: made.get(name, name) for name in names.split(",") if name not in task.without}


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
            data = far(name, task, split) if task.pixels == 64 else natural(options.natural, name, task, split)
            prepared = prepare_comparison(
                task.model,
                data,
                wanted,
                output_dir=options.work / kind / f"{name}_{split}",
                settings=Settings(options.trials, options.seeds, hours=max(1e-3, (end - time.monotonic()) / 3600)),
                image_size=task.pixels,
                num_train_epochs=options.epochs or task.epochs,
                per_device_train_batch_size=32,
                tell=lambda line: print(line, flush=True),
            )
            print(f"{name}, split {split}: {prepared.estimate()}", flush=True)
            prepared.runner.run()
            # The advice is only recorded afterwards: here every strategy is run.
            advice = prepared.advised()
            command = f"python tests/benchmarks/results.py --natural FOLDER --tasks {name} --splits {split}"
            results = prepared.finish(command + (" --trials 0" if not options.trials else ""), advice)
            if any(contender.status in ("unfinished", "not reached") for contender in results.contenders):
                print("the time limit was reached: start it again to continue", flush=True)
                return
            kept.parent.mkdir(parents=True, exist_ok=True)
            if earlier is not None:  # full fine-tuning was run again with the new strategies: the same split and seeds
                more = tuple(contender for contender in results.contenders if contender.name not in known)
                results = replace(earlier, contenders=(*earlier.contenders, *more))
            results.save(kept)
            print(f"{name}, split {split}: {len(results.contenders)} strategies", flush=True)


if __name__ == "__main__":
    main()
