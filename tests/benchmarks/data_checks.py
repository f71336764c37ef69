"""What the data checks find in real data, and what they cost: the tables of docs/data_checks.md.

python -m tests.benchmarks.data_checks elpv mnist5k caltech40/ --model mobilenet_v2 --px 96
python -m tests.benchmarks.data_checks --docstrings sklearn,numpy,torch
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import pkgutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance
from transformers import TrainingArguments

from hf_ft import FTTrainer
from hf_ft.data import check_data, check_images, find_columns, load_splits, open_rgb
from hf_ft.data.classifier import load_classifier
from hf_ft.data.columns import values_of
from hf_ft.data.duplicates import near_sets
from hf_ft.data.media import IMAGES
from hf_ft.data.near import JACCARD, near_texts
from hf_ft.data.prints import WORDS, Prints, image_print, text_print
from hf_ft.data.progress import hide_bars
from hf_ft.data.task import Data, process
from hf_ft.documents.public import shareable_name

CHANGED = 100  # images of each dataset that are changed


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _resized(image: Image.Image, times: float) -> Image.Image:
    return image.resize((round(image.width * times), round(image.height * times)), Image.Resampling.BICUBIC)


def _cropped(image: Image.Image, share: float) -> Image.Image:
    edge = max(1, round(share * min(image.size)))
    return image.crop((edge, edge, image.width - edge, image.height - edge))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG 90": lambda image: _compressed(image, 90),
    "JPEG 50": lambda image: _compressed(image, 50),
    "half the size": lambda image: _resized(image, 0.5),
    "twice the size": lambda image: _resized(image, 2),
    "brighter by 10%": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "less contrast by 20%": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "cropped by 1% a side": lambda image: _cropped(image, 0.01),
}


def seconds(run: Callable[[], Any]) -> float:
    """The lowest processor time of three calls, so that other processes on the machine do not count."""
    times = []
    for _ in range(3):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def row(name: str, model: str | None, px: int) -> list[str]:
    splits = load_splits(name, test_fraction=0.25)
    columns = find_columns(splits)
    opening = seconds(lambda: check_images(splits, columns))
    printing = seconds(lambda: check_images(splits, columns, prints=Prints())) - opening
    prints = Prints()
    check_images(splits, columns, prints=prints)
    comparing = seconds(lambda: check_data(splits, columns, prints=prints))
    found = check_data(splits, columns, prints=prints)
    kinds = [sum(len(one.samples) - 1 for one in found.duplicates if one.kind == kind) for kind in ("same", "near")]
    cells = [
        shareable_name(name),
        f"{sum(found.sizes.values()):,}",
        *(f"{s:.2f}" for s in (opening, printing, comparing)),
    ]
    epoch = [] if model is None else [f"{(printing + comparing) / _epoch(splits, columns, model, px):.1%}"]
    return [*cells, *epoch, *map(str, kinds)]


def _epoch(splits: Any, columns: Any, model: str, px: int) -> float:
    """Processor seconds of one epoch of full fine-tuning."""
    network, processor = load_classifier(model, columns, 0, px)
    data = process(Data(splits, columns, augment="basic"), network, processor)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=32, use_cpu=True, remove_unused_columns=False,
            report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = FTTrainer(
            network, args, train_dataset=data.splits["train"], data_collator=data.collate, strategy="full"
        )
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def changed(name: str) -> list[str]:
    """The share of changed copies that are found, for each change."""
    split = load_splits(name, test_fraction=0.25)["train"]
    columns = find_columns(split)
    rows = np.random.default_rng(0).permutation(len(split))[:CHANGED].tolist()
    column = split.select(rows).cast_column(columns.inputs[0], IMAGES.unopened)
    images = [open_rgb(value, row) for row, value in zip(rows, values_of(column, columns.inputs[0]), strict=True)]
    shares = []
    for change in CHANGES.values():
        found = [near_sets([image_print(image), image_print(change(image))]) for image in images]
        shares.append(f"{np.mean([bool(sets) for sets in found]):.0%}")
    return [shareable_name(name), *shares]


def docstrings(packages: str) -> str:
    """Near pairs among the docstrings of packages, and how many of them overlap less than they should."""
    texts = sorted({text for name in packages.split(",") for text in _docstrings(name)})
    start = time.process_time()
    prints = [text_print([text]) for text in texts]
    known = [place for place, one in enumerate(prints) if one.sketch is not None]
    pairs = near_texts(np.stack([prints[place].sketch for place in known]))
    took = time.process_time() - start
    shared = [_jaccard(texts[known[one]], texts[known[other]]) for one, other in pairs.tolist()]
    below = [share for share in shared if share < JACCARD - 0.1]
    return (
        f"{len(texts):,} docstrings, {len(known):,} of ten words or more, {took:.1f} s: {len(pairs):,} near pairs, of "
        f"which {len(below):,} share less than {JACCARD - 0.1:.0%}; the least {min(shared):.0%}"
    )


def _docstrings(package: str) -> Iterator[str]:
    root = importlib.import_module(package)
    for info in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda name: None):
        if ".tests" in info.name or info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except BaseException:  # an optional part, or one that exits
            continue
        for _, member in inspect.getmembers(module, lambda m: inspect.isfunction(m) or inspect.isclass(m)):
            if (member.__module__ or "").startswith(package) and isinstance(member.__doc__, str):
                yield member.__doc__


def _jaccard(one: str, other: str) -> float:
    sets = []
    for text in (one, other):
        words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
        sets.append({tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="What the data checks find in real data, and what they cost.")
    parser.add_argument("data", nargs="*", help="as for hf-ft train")
    parser.add_argument("--model", help="also print the cost relative to an epoch of full fine-tuning with this model")
    parser.add_argument("--px", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--docstrings", help="packages, separated by commas, whose docstrings are compared")
    flags = parser.parse_args()
    hide_bars()
    warnings.simplefilter("ignore")
    epoch = [] if flags.model is None else ["of an epoch"]
    titles = ["data", "images", "opening", "fingerprints", "comparison", *epoch, "equal", "nearly equal"]
    for headers, line in ((titles, lambda name: row(name, flags.model, flags.px)), (["data", *CHANGES], changed)):
        if flags.data:
            print(f"| {' | '.join(headers)} |\n|{' --- |' * len(headers)}")
        for name in flags.data:
            print(f"| {' | '.join(line(name))} |", flush=True)
    if flags.docstrings:
        print(docstrings(flags.docstrings))


if __name__ == "__main__":
    main()
