"""Which columns of a data set are inputs and labels, and how labels become numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import ClassLabel, Dataset, DatasetDict, Image, List, Value

from hf_ft.errors import DataError
from hf_ft.zoo.datasets import Task

ROW = "__row__"  # the row number in the source: splits are shuffled, and an error must name the row
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "fine_label")
IMAGE_NAMES = ("image", "img", "image_path", "file_name", "filename", "file", "path")
TEXT_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
TEXT_NAMES = (("text",), *TEXT_PAIRS, ("question", "sentence"), ("sentence",), ("content",), ("review",))
LOOKED_AT = 100  # rows that tell what a column of text holds
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


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
        DataError: a column is missing or unfit, splits disagree, or training or validation rows lack a label.
    """
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {"train": dataset}
    first = next(iter(splits.values()))
    texts = tuple(text.strip() for text in text_column.split(",")) if text_column else ()
    label = label_column or usual_label(first)
    if label is None:
        raise DataError(f"no label column among {_shown(first)}: set label_column", arguments=("label_column",))
    inputs = (image_column,) if image_column else texts or _usual_inputs(first)
    given = "image_column" if image_column else "text_column"
    for name, split in splits.items():
        for column in (*inputs, label):
            if column not in split.column_names:
                wrong = "label_column" if column == label else given
                there = f"only {_shown(split)}"
                raise DataError(f"split {name!r} has no column {column!r}, {there}: set {wrong}", arguments=(wrong,))
        if name != "test" and (rows := unlabelled(split, label)):
            raise DataError(
                f"split {name!r}: {len(rows)} rows have no {label!r} (the first is row {rows[0]}): drop them, "
                "or set label_column",
                arguments=("label_column",),
            )
    image = bool(image_column) or (not texts and _is_image(first, inputs[0]))
    return Columns("image" if image else "text", inputs, label, *_classes(splits, label))


def _classes(splits: Mapping[str, Dataset], label: str) -> tuple[ProblemType, tuple[str, ...], dict[Any, int] | None]:
    features = {name: split.features[label] for name, split in splits.items()}
    feature = next(iter(features.values()))
    if any(other != feature for other in features.values()):
        raise DataError(f"the splits disagree on what column {label!r} holds: {features}")
    if isinstance(feature, List) and isinstance(feature.feature, ClassLabel):
        return "multi_label_classification", tuple(feature.feature.names), None
    if isinstance(feature, ClassLabel):
        return "single_label_classification", tuple(feature.names), None
    if isinstance(feature, Value) and "float" in feature.dtype:
        return "regression", (), None
    if isinstance(feature, Value):
        values = sorted({value for split in splits.values() for value in values_of(split, label)} - {None})
        index = {value: number for number, value in enumerate(values)}
        return "single_label_classification", tuple(map(str, values)), index
    raise DataError(
        f"column {label!r} holds {feature}, not a class or a number: set label_column", arguments=("label_column",)
    )


def unlabelled(split: Dataset, label: str) -> list[int]:
    """List the source rows without a label: None, NaN, or the -1 that hides a benchmark's test classes."""
    classes = isinstance(split.features[label], ClassLabel)

    def missing(value: Any) -> bool:
        return value is None or (isinstance(value, float) and math.isnan(value)) or (classes and value < 0)

    rows = values_of(split, ROW) if ROW in split.column_names else range(len(split))
    return [row for row, value in zip(rows, values_of(split, label), strict=True) if missing(value)]


def values_of(split: Dataset, column: str) -> list[Any]:
    """A column as it is stored, whatever transform is set."""
    return split.with_format(None)[column][:]


def some_text(split: Dataset, column: str) -> list[str]:
    """The first values that are not missing; these files may not exist, or the first row have none."""
    values = values_of(split.select(range(min(LOOKED_AT, len(split)))), column)
    return [value for value in values if value is not None]


def _shown(split: Dataset) -> list[str]:
    return [name for name in split.column_names if name != ROW]


def is_text(split: Dataset, column: str) -> bool:
    feature = split.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_image(split: Dataset, column: str) -> bool:
    if isinstance(split.features.get(column), Image):
        return True
    if column not in IMAGE_NAMES or not is_text(split, column):
        return False
    values = some_text(split, column)
    return bool(values) and values[0].lower().endswith(IMAGE_SUFFIXES)


def usual_label(split: Dataset) -> str | None:
    """The column of labels by its name, else by its type."""
    typed = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    return next((name for name in (*LABEL_NAMES, *typed) if name in split.features), None)


def _usual_inputs(split: Dataset) -> tuple[str, ...]:
    for column in sorted(split.column_names, key=lambda name: name not in IMAGE_NAMES):
        if _is_image(split, column):
            return (column,)
    for columns in TEXT_NAMES:
        if all(column in split.column_names for column in columns):
            return columns
    raise DataError(
        f"no image or text column among {_shown(split)}: set image_column or text_column",
        arguments=("image_column", "text_column"),
    )
