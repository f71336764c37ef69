"""From whatever a user names as data to splits that the Trainer can read.

:func:`load_splits` reads the data, :func:`find_columns` tells inputs from labels, and :func:`prepare` with
:func:`collate` turn rows into batches. No code is ever downloaded: ``datasets`` reads files, not scripts.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Image, List, Value, load_dataset, load_from_disk
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.utils import logging

from .collaborative_processor import CollaborativeTokenizer
from .zoo import DATASETS, Task, stratified_split

ROW = "__row__"  # the row number in the source: splits are shuffled, and an error must name the row
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
TEST_NAMES = ("test", "testing", "eval", "evaluation")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "fine_label")
IMAGE_NAMES = ("image", "img", "image_path", "file_name", "filename", "file", "path")
TEXT_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
TEXT_NAMES = (("text",), *TEXT_PAIRS, ("question", "sentence"), ("sentence",), ("content",), ("review",))
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
logger = logging.get_logger(__name__)


def load_splits(
    source: str,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_fraction: float = 0.2,
    max_train_samples: int | None = None,
    label_column: str | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Read a data set and settle its splits: ``train``, ``validation`` and, where there is one, ``test``.

    Args:
        source: a short name of :mod:`hf_ft.zoo`; a folder of class folders of images, or of split folders of
            those; a csv, tsv, json, jsonl or parquet file, or a folder of them; a folder written by
            ``save_to_disk``; or a Hub id.
        validation_split: by default the usual names are tried, and where there is none ``validation_fraction``
            of the training rows are set aside, stratified. The test split is never used for it.
        label_column: what to stratify by (default: as :func:`find_columns` finds it).

    Raises:
        ValueError: the source cannot be read, or a split is missing.
    """
    found = _read(source, config_name, train_split)
    taken = (train_split, validation_split, test_split)
    wanted = {
        "train": (train_split, ()),
        "validation": (validation_split, VALIDATION_NAMES),
        "test": (test_split, TEST_NAMES),
    }
    parts = DatasetDict()
    for key, (name, usual) in wanted.items():
        name = name or next((other for other in usual if other in found and other not in taken), None)
        if name is not None and name not in found:
            raise ValueError(f"{source!r} has no split {name!r}, only {list(found)}: set --{key}_split")
        if name is not None:
            part = found[name]
            parts[key] = part if ROW in part.column_names else part.add_column(ROW, np.arange(len(part)))
    by = _stratify_by(parts["train"], label_column)
    if "validation" not in parts:
        parts |= _carve(parts["train"], validation_fraction, seed, by)
    if max_train_samples is not None and max_train_samples < len(parts["train"]):
        parts["train"] = stratified_split(parts["train"], max_train_samples, 0, 0, seed, by)["train"]
    return DatasetDict({key: parts[key] for key in wanted if key in parts})


def load_split(source: str, split: str = "train") -> Dataset:
    """Read one split of a data set as it is (see :func:`load_splits`).

    Raises:
        ValueError: the source cannot be read, or has no such split.
    """
    found = _read(source, None, split)
    if split not in found:
        raise ValueError(f"{source!r} has no split {split!r}, only {list(found)}: set --source_split")
    part = found[split]
    return part if ROW in part.column_names else part.add_column(ROW, np.arange(len(part)))


def _carve(train: Dataset, fraction: float, seed: int, by: str | None) -> dict[str, Dataset]:
    size = round(len(train) * fraction)
    if not 0 < size < len(train):
        raise ValueError(
            f"validation_fraction={fraction} of {len(train)} rows leaves a split empty: set "
            "--validation_fraction between 0 and 1, or name a --validation_split"
        )
    parts = stratified_split(train, len(train) - size, size, 0, seed, by)
    return {"train": parts["train"], "validation": parts["validation"]}


def _stratify_by(train: Dataset, label_column: str | None) -> str | None:
    label = label_column or _usual_label(train)
    if label is None or label not in train.column_names:
        return None
    feature = train.features[label]
    number = isinstance(feature, Value) and "float" in feature.dtype
    discrete = isinstance(feature, ClassLabel | Value) and not number
    return label if discrete and None not in _values(train, label) else None


def _read(source: str, config_name: str | None, train_split: str) -> DatasetDict:
    path = Path(source).expanduser()
    try:
        if source in DATASETS:
            return DatasetDict({train_split: DATASETS[source]()})
        if path.is_dir():
            return _read_folder(path, config_name, train_split)
        if path.is_file():
            options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
            reader = READERS[path.suffix.lower()]
            data = load_dataset(reader, data_files={train_split: str(path)}, **options)
            return _absolute_image_paths(data, path.parent)
        if source.startswith((".", "/", "~")):
            raise FileNotFoundError("no such file or folder")
        return load_dataset(source, name=config_name)
    except ImportError:
        raise  # a short name's package is missing: the message says how to install it
    except Exception as error:  # `datasets` raises many types, some with no hint of what was asked for
        raise ValueError(
            f"cannot read the data {source!r} ({type(error).__name__}: {error}); it may be one of "
            f"{', '.join(DATASETS)}, a folder of images, a file or folder of {', '.join(READERS)}, a folder "
            "written by save_to_disk, or a Hub id (with --config_name where it has several)"
        ) from error


def _read_folder(path: Path, config_name: str | None, train_split: str) -> DatasetDict:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        data = load_from_disk(str(path))
        return data if isinstance(data, DatasetDict) else DatasetDict({train_split: data})
    if (patterns := _image_patterns(path, train_split)) is None:
        return _absolute_image_paths(load_dataset(str(path), name=config_name), path)
    return load_dataset("imagefolder", data_dir=str(path), data_files=patterns, drop_labels=False, drop_metadata=True)


def _image_patterns(folder: Path, train_split: str) -> dict[str, str] | None:
    # Said explicitly, because `datasets` guesses splits from any name on the way: a file called test_1.png
    # in a class folder, or a class called "train" beside "bus", would go to another split.
    def holds_classes(parent: Path) -> bool:
        classes = (child for child in parent.iterdir() if child.is_dir())
        return any(file.suffix.lower() in IMAGE_SUFFIXES for child in classes for file in child.iterdir())

    if any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*")):
        return None
    splits = [child.name for child in sorted(folder.iterdir()) if child.is_dir() and holds_classes(child)]
    if train_split in splits:
        return {name: f"{name}/**" for name in splits}
    return {train_split: "**"} if holds_classes(folder) else None


def _absolute_image_paths(data: DatasetDict, folder: Path) -> DatasetDict:
    """Read the image paths of a table from where the table is, not from the working folder."""

    def absolute(values: list[str | None], column: str) -> dict[str, list[str | None]]:
        return {column: [value if value is None else str(folder / value) for value in values]}

    first = next(iter(data.values()))
    for column in [name for name in first.column_names if _is_text(first, name)]:
        value = _first(first, column)
        if value.lower().endswith(IMAGE_SUFFIXES) and (folder / value).is_file():
            data = data.map(absolute, batched=True, input_columns=column, fn_kwargs={"column": column})
    return data


@dataclass(frozen=True)
class Columns:
    """What to read from a row, and how labels become numbers: the same for all splits."""

    task: Task
    inputs: tuple[str, ...]  # one column of images, or one or two of text
    label: str
    problem_type: ProblemType
    names: tuple[str, ...] = ()  # of the classes, in order
    index: Mapping[Any, int] | None = None  # of label values that are not class numbers yet

    @property
    def num_labels(self) -> int:
        return max(1, len(self.names))

    @property
    def id2label(self) -> dict[int, str] | None:
        return dict(enumerate(self.names)) or None

    def encode(self, values: Sequence[Any]) -> list[Any]:
        """Turn the label column's values into class numbers, multi-hot rows of floats, or floats."""
        if self.problem_type == "regression":
            return [float(value) for value in values]
        if self.problem_type == "multi_label_classification":
            return [[float(index in value) for index in range(len(self.names))] for value in values]
        return [value if self.index is None else self.index[value] for value in values]


def find_columns(
    dataset: Dataset | DatasetDict,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Columns:
    """Tell inputs from labels by name and type, and number the classes alike in all splits.

    Strings, booleans and integers become classes in sorted order; floats are a regression target; lists of
    classes are multi-label.

    Args:
        text_column: one name, or two joined by a comma for pairs.

    Raises:
        ValueError: a column is missing or unfit, splits disagree, or training or validation rows lack a label.
    """
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {"train": dataset}
    first = next(iter(splits.values()))
    texts = tuple(text.strip() for text in text_column.split(",")) if text_column else ()
    label = label_column or _usual_label(first)
    if label is None:
        raise ValueError(f"no label column among {_shown(first)}: set --label_column")
    inputs = (image_column,) if image_column else texts or _usual_inputs(first)
    flag = "--image_column" if image_column else "--text_column"
    for name, split in splits.items():
        for column in (*inputs, label):
            if column not in split.column_names:
                wrong = "--label_column" if column == label else flag
                raise ValueError(f"split {name!r} has no column {column!r}, only {_shown(split)}: set {wrong}")
        if name != "test" and (rows := unlabelled(split, label)):
            raise ValueError(
                f"split {name!r}: {len(rows)} rows have no {label!r} (the first is row {rows[0]}): drop them, "
                "or set --label_column"
            )
    image = bool(image_column) or (not texts and _is_image(first, inputs[0]))
    return Columns("image" if image else "text", inputs, label, *_classes(splits, label))


def _classes(splits: Mapping[str, Dataset], label: str) -> tuple[ProblemType, tuple[str, ...], dict[Any, int] | None]:
    features = {name: split.features[label] for name, split in splits.items()}
    feature = next(iter(features.values()))
    if any(other != feature for other in features.values()):
        raise ValueError(f"the splits disagree on what column {label!r} holds: {features}")
    if isinstance(feature, List) and isinstance(feature.feature, ClassLabel):
        return "multi_label_classification", tuple(feature.feature.names), None
    if isinstance(feature, ClassLabel):
        return "single_label_classification", tuple(feature.names), None
    if isinstance(feature, Value) and "float" in feature.dtype:
        return "regression", (), None
    if isinstance(feature, Value):
        values = sorted({value for split in splits.values() for value in _values(split, label)} - {None})
        index = {value: number for number, value in enumerate(values)}
        return "single_label_classification", tuple(map(str, values)), index
    raise ValueError(f"column {label!r} holds {feature}, not a class or a number: set --label_column")


def unlabelled(split: Dataset, label: str) -> list[int]:
    """List the source rows without a label: None, NaN, or the -1 that hides a benchmark's test classes."""
    classes = isinstance(split.features[label], ClassLabel)

    def missing(value: Any) -> bool:
        return value is None or (isinstance(value, float) and math.isnan(value)) or (classes and value < 0)

    rows = _values(split, ROW) if ROW in split.column_names else range(len(split))
    return [row for row, value in zip(rows, _values(split, label), strict=True) if missing(value)]


def _values(split: Dataset, column: str) -> list[Any]:
    return split.with_format(None)[column][:]  # whatever transform is set on it


def _first(split: Dataset, column: str) -> str:
    return str(_values(split.select(range(1)), column)[0]) if len(split) else ""


def _shown(split: Dataset) -> list[str]:
    return [name for name in split.column_names if name != ROW]


def _is_text(split: Dataset, column: str) -> bool:
    feature = split.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_image(split: Dataset, column: str) -> bool:
    if isinstance(split.features.get(column), Image):
        return True
    named = column in IMAGE_NAMES and _is_text(split, column)
    return named and _first(split, column).lower().endswith(IMAGE_SUFFIXES)


def _usual_label(split: Dataset) -> str | None:
    typed = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    return next((name for name in (*LABEL_NAMES, *typed) if name in split.features), None)


def _usual_inputs(split: Dataset) -> tuple[str, ...]:
    for column in sorted(split.column_names, key=lambda name: name not in IMAGE_NAMES):
        if _is_image(split, column):
            return (column,)
    for columns in TEXT_NAMES:
        if all(column in split.column_names for column in columns):
            return columns
    raise ValueError(f"no image or text column among {_shown(split)}: set --image_column or --text_column")


def _shifted(side: int) -> np.ndarray:
    index = np.abs(np.arange(side) + random.randint(-(side // 8), side // 8))
    return np.minimum(index, 2 * (side - 1) - index)  # mirrored at the edge, without repeating it


def flip_and_shift(image: PIL.Image.Image) -> PIL.Image.Image:
    """Mirror left and right with probability 0.5 and shift by up to 1/8 of each side, reflecting the edge.

    Draws from Python's ``random``, whose state the Trainer saves in its checkpoints and restores.
    """
    pixels = np.asarray(image)
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    rows, columns = _shifted(pixels.shape[0]), _shifted(pixels.shape[1])
    return PIL.Image.fromarray(pixels[rows][:, columns])


AUGMENTATIONS: dict[str, Callable[[PIL.Image.Image], PIL.Image.Image] | None] = {
    "none": None,
    "basic": flip_and_shift,
}


def _open_rgb(value: Any, row: int) -> PIL.Image.Image:
    value = {"path": value, "bytes": None} if isinstance(value, str) else value
    try:
        return Image().decode_example(value).convert("RGB")
    except Exception as error:  # a damaged file makes PIL raise almost anything
        path = value.get("path") if isinstance(value, dict) else None
        raise ValueError(f"cannot read the image in row {row} ({path or 'no path'}): {error}") from error


def _image_batch(batch: dict[str, list[Any]], processor: Any, columns: Columns, augment: str) -> dict[str, Any]:
    values = batch[columns.inputs[0]]
    rows = batch.get(ROW, range(len(values)))
    images = [_open_rgb(value, row) for value, row in zip(values, rows, strict=True)]
    if change := AUGMENTATIONS[augment]:
        images = [change(image) for image in images]
    ready = {name: list(tensor) for name, tensor in processor(images=images, return_tensors="pt").items()}
    return ready | ({"labels": columns.encode(batch[columns.label])} if columns.label in batch else {})


def image_transform(processor: Any, columns: Columns, augment: str = "none") -> Callable[[dict[str, Any]], Any]:
    """Make the function for ``Dataset.set_transform`` that opens, augments and processes a batch of images.

    A damaged image raises a ``ValueError`` that names its row in the source (or, for data that does not come
    from :func:`load_splits`, its place in the batch) and its path.
    """
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment={augment!r} is unknown: choose one of {', '.join(AUGMENTATIONS)}")
    return partial(_image_batch, processor=processor, columns=columns, augment=augment)


def _text_batch(
    batch: dict[str, list[Any]], tokenizer: Any, columns: Columns, max_length: int | None
) -> dict[str, Any]:
    texts = [batch[column] for column in columns.inputs]
    for column, values in zip(columns.inputs, texts, strict=True):
        if None in values:
            row = batch.get(ROW, range(len(values)))[values.index(None)]
            raise ValueError(f"row {row} has no text in column {column!r}: drop it, or set --text_column")
    encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    return encoded | {"labels": columns.encode(batch[columns.label])}


def text_transform(tokenizer: Any, columns: Columns, max_length: int | None = None) -> Callable[[dict[str, Any]], Any]:
    """Make the function for ``Dataset.map(batched=True)`` that tokenises, cut at ``max_length`` tokens."""
    return partial(_text_batch, tokenizer=tokenizer, columns=columns, max_length=max_length)


def prepare(
    splits: DatasetDict,
    processor: Any,
    columns: Columns,
    augment: str = "none",
    max_length: int | None = None,
) -> DatasetDict:
    """Make the splits ready for the Trainer; only ``train`` is augmented.

    Images are read when they are asked for, so the Trainer needs ``remove_unused_columns=False``: the image
    column is none of the model's arguments. A test split without labels is left out, with a warning.
    """
    ready = DatasetDict()
    for name, split in splits.items():
        if name == "test" and unlabelled(split, columns.label):
            logger.warning("the test split has rows without a label: it is left out")
        elif columns.task == "text":
            tokenise = text_transform(processor, columns, max_length)
            ready[name] = _named(split.map(tokenise, batched=True, remove_columns=split.column_names), columns)
        else:
            ready[name] = _images(split, processor, columns, augment if name == "train" else "none")
    return ready


def _named(ready: Dataset, columns: Columns) -> Dataset:
    """The same with names of its classes, where a label is one of them."""
    if columns.problem_type != "single_label_classification":
        return ready
    return ready.cast_column("labels", ClassLabel(names=list(columns.names)))


def _images(split: Dataset, processor: Any, columns: Columns, augment: str) -> Dataset:
    image, label = columns.inputs[0], columns.label
    split = split.select_columns([name for name in (image, label, ROW) if name in split.column_names])
    if columns.problem_type == "single_label_classification":
        # Numbered in the data set itself, not on the way: label checks and class weights read this column.
        if columns.index is None:
            split = split if label == "labels" else split.rename_column(label, "labels")
        else:
            numbers, feature = columns.encode(_values(split, label)), ClassLabel(names=list(columns.names))
            split = split.remove_columns(label).add_column("labels", numbers, feature=feature)
        columns = replace(columns, label="labels", index=None)
    # Undecoded: opening the file in the transform lets an error name the row.
    split = split.cast_column(image, Image(decode=False))
    return split.with_transform(image_transform(processor, columns, augment))


def collate(processor: Any) -> Callable[[list[Any]], Any]:
    """Choose what stacks prepared rows into a batch: padding for a tokenizer, plain stacking for images."""
    text = isinstance(processor, PreTrainedTokenizerBase | CollaborativeTokenizer)
    return DataCollatorWithPadding(processor) if text else default_data_collator
