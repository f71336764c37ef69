"""Input and label columns of a data set, and the encoding of labels as numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import ClassLabel, Dataset, DatasetDict, List, Value

from hf_ft.data.media import MEDIA, Media
from hf_ft.data.unknown_classes import check_known, hides_labels, is_missing
from hf_ft.errors import DataError
from hf_ft.models.tasks import Task

ROW = "__row__"  # row number in the source: splits are shuffled, and error messages must name the row
LABEL_NAMES = ("label", "labels", "class", "target", "category", "fine_label")
TEXT_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
TEXT_NAMES = (("text",), *TEXT_PAIRS, ("question", "sentence"), ("sentence",), ("content",), ("review",))
MANY = 1000  # rows inspected to find columns of few values
LOOKED_AT = 100  # rows inspected to determine the content of a text column
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Columns:
    """Columns to read from a row, and the encoding of labels as numbers: the same for all splits."""

    task: Task
    inputs: tuple[str, ...]  # one image or audio column, or one or two text columns
    label: str
    problem_type: ProblemType
    names: tuple[str, ...] = ()  # class names, in order
    index: Mapping[Any, int] | None = None  # class number by label value, unless labels are class numbers already
    multi_hot: bool = False  # whether labels are rows of zeros and ones, one for each class

    @property
    def num_labels(self) -> int:
        return max(1, len(self.names))

    @property
    def id2label(self) -> dict[int, str] | None:
        return dict(enumerate(self.names)) or None

    def encode(self, values: Sequence[Any]) -> list[Any]:
        """Encode label values as class numbers, multi-hot rows of floats, or floats."""
        if self.problem_type == "regression":
            return [float(value) for value in values]
        if self.problem_type == "multi_label_classification":
            return [self._multi_hot(value) for value in values]
        return [_number_or_self(self.index, value) for value in values]

    def _multi_hot(self, labels: Sequence[Any]) -> list[float]:
        if self.multi_hot:
            return [float(value) for value in labels]
        present = {_number_or_self(self.index, label) for label in labels}
        return [float(number in present) for number in range(len(self.names))]


def _number_or_self(index: Mapping[Any, int] | None, value: Any) -> Any:
    return value if index is None else index[value]


def find_columns(
    dataset: Dataset | DatasetDict,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    audio_column: str | None = None,
) -> Columns:
    """Find input and label columns by name and type, and number the classes consistently across splits.

    Strings, booleans and integers become classes in sorted order; floats are regression targets; lists of classes, or
    rows of equal length of zeros and ones, are multi-label. Classes are those of the training split.

    Args:
        text_column: one name, or two separated by a comma for text pairs.

    Raises:
        DataError: if a column is missing or unsuitable, splits disagree, or training or validation rows lack a label.
    """
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {"train": dataset}
    first = next(iter(splits.values()))
    label = label_column or usual_label(first)
    if label is None:
        likely = _few_values(first)
        hint = f", such as {' or '.join(map(repr, likely))}" if likely else ""
        raise DataError(
            f"no label column among {shown_columns(first)}: set label_column{hint}", arguments=("label_column",)
        )
    inputs, given = _named_inputs(image_column, text_column, audio_column) or (_usual_inputs(first), "text_column")
    for name, split in splits.items():
        for column in (*inputs, label):
            if column not in split.column_names:
                wrong = "label_column" if column == label else given
                there = f"only {shown_columns(split)}"
                raise DataError(f"split {name!r} has no column {column!r}, {there}: set {wrong}", arguments=(wrong,))
        if name != "test" and (rows := unlabelled(split, label, splits.get("train"))):
            raise DataError(
                f"split {name!r}: {len(rows)} rows have no {label!r} (the first is row {rows[0]}): drop them, "
                "or set label_column",
                arguments=("label_column",),
            )
    named = bool(image_column or audio_column or text_column)
    task = _task_of(first, inputs, given if named else None)
    return Columns(task, inputs, label, *_classes(splits, label))


def find_inputs(
    split: Dataset, image_column: str | None = None, text_column: str | None = None, audio_column: str | None = None
) -> tuple[Task, tuple[str, ...]]:
    """The kind of data, and the input columns, of rows that need no labels; arguments as for :func:`find_columns`.

    Raises:
        DataError: if a column is missing or unsuitable.
    """
    named = _named_inputs(image_column, text_column, audio_column)
    inputs, given = named or (_usual_inputs(split), "text_column")
    for column in inputs:
        if column not in split.column_names:
            raise DataError(
                f"there is no column {column!r}, only {shown_columns(split)}: set {given}", arguments=(given,)
            )
    return _task_of(split, inputs, given if named else None), inputs


def _named_inputs(image: str | None, text: str | None, audio: str | None) -> tuple[tuple[str, ...], str] | None:
    """The input columns that the user names, and the argument that names them."""
    for column, argument in ((image, "image_column"), (audio, "audio_column")):
        if column:
            return (column,), argument
    return (tuple(part.strip() for part in text.split(",")), "text_column") if text else None


def _task_of(split: Dataset, inputs: Sequence[str], named_by: str | None) -> Task:
    """The kind of data: by the argument that names the columns, or else by type, name and content."""
    task: Task = {"image_column": "image", "audio_column": "audio"}.get(named_by or "", "text")  # type: ignore[assignment]
    if named_by is None and (media := _media(split, inputs[0])) is not None:
        task = media.task
    structured = [column for column in inputs if task == "text" and not isinstance(split.features[column], Value)]
    if structured:
        raise DataError(
            f"column {structured[0]!r} is of type {split.features[structured[0]]}, not a text: set text_column",
            arguments=("text_column",),
        )
    return task


def _classes(
    splits: Mapping[str, Dataset], label: str
) -> tuple[ProblemType, tuple[str, ...], dict[Any, int] | None, bool]:
    features = {name: split.features[label] for name, split in splits.items()}
    feature = next(iter(features.values()))
    if any(other != feature for other in features.values()):
        types = ", ".join(
            f"{name} {kind.dtype if isinstance(kind, Value) else kind}" for name, kind in features.items()
        )
        raise DataError(
            f"the splits disagree on the type of column {label!r} ({types}): write labels the same way in all"
        )
    if isinstance(feature, List) and isinstance(feature.feature, ClassLabel):
        return "multi_label_classification", tuple(feature.feature.names), None, False
    if isinstance(feature, ClassLabel):
        return "single_label_classification", tuple(feature.names), None, False
    if isinstance(feature, Value) and "float" in feature.dtype:
        return "regression", (), None, False
    if isinstance(feature, Value):
        train = values_of(splits.get("train", next(iter(splits.values()))), label)
        hidden = hides_labels(feature, train)
        for name, split in splits.items():
            check_known(name, values_of(split, label), train, hidden)
        return "single_label_classification", *_numbered({v for v in train if not is_missing(v, hidden)}), False
    if isinstance(feature, List) and isinstance(feature.feature, Value):
        return "multi_label_classification", *_several(
            {name: values_of(split, label) for name, split in splits.items()}
        )
    raise DataError(
        f"column {label!r} is of type {feature}, not a class or a number: set label_column", arguments=("label_column",)
    )


def _numbered(values: Collection[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names, and class numbers by value, in sorted order."""
    ordered = sorted(values)
    return tuple(map(str, ordered)), {value: number for number, value in enumerate(ordered)}


def _several(labels: Mapping[str, Sequence[Any]]) -> tuple[tuple[str, ...], dict[Any, int] | None, bool]:
    """Class names, class numbers by value, and whether labels are rows of zeros and ones."""
    rows = [row for split in labels.values() for row in split if row is not None]
    lengths = {len(row) for row in rows}
    if len(lengths) == 1 and lengths != {1} and all(value in (0, 1) for row in rows for value in row):
        return tuple(map(str, range(lengths.pop()))), None, True
    flat = {name: [value for row in split for value in row or ()] for name, split in labels.items()}
    train = flat.get("train", next(iter(flat.values())))
    for name, values in flat.items():
        check_known(name, values, train, hidden=False)
    return *_numbered(set(train)), False


def unlabelled(split: Dataset, label: str, train: Dataset | None = None) -> list[int]:
    """Source row numbers without a label: None, NaN, or the -1 that hides a benchmark's test classes.

    Args:
        train: the training split, where -1 might be a class.
    """
    hidden = hides_labels(split.features[label], values_of(split if train is None else train, label))
    rows = values_of(split, ROW) if ROW in split.column_names else range(len(split))
    return [row for row, value in zip(rows, values_of(split, label), strict=True) if is_missing(value, hidden)]


def values_of(split: Dataset, column: str) -> list[Any]:
    """The stored values of a column, ignoring any transform."""
    return split.with_format(None)[column][:]


def some_text(split: Dataset, column: str) -> list[str]:
    """The first non-missing values of a text column; if they are paths, the files may not exist."""
    values = values_of(split.select(range(min(LOOKED_AT, len(split)))), column)
    return [value for value in values if value is not None]


def shown_columns(split: Dataset) -> list[str]:
    """The columns of the source, for messages."""
    return [name for name in split.column_names if name != ROW]


def is_text(split: Dataset, column: str) -> bool:
    feature = split.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _media(split: Dataset, column: str) -> Media | None:
    """The kind of the files in a column, by its type, or by its name and the suffix of its first path."""
    for media in MEDIA:
        if media.is_type(split.features.get(column)):
            return media
        if column in media.columns and is_text(split, column):
            values = some_text(split, column)
            if values and media.holds(values[0]):
                return media
    return None


def usual_label(split: Dataset) -> str | None:
    """The label column, by name or else by type."""
    typed = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    return next((name for name in (*LABEL_NAMES, *typed) if name in split.features), None)


def _few_values(split: Dataset) -> list[str]:
    """Columns that may be labels: several rows for each value, and at least two values."""
    some = split.select(range(min(MANY, len(split))))
    found = []
    for name in shown_columns(split):
        feature = split.features[name]
        if isinstance(feature, Value) and feature.dtype in ("string", "large_string", "bool", "int64", "int32"):
            count = len(set(values_of(some, name)) - {None})
            if 2 <= count <= len(some) / 2:
                found.append(name)
    return found


def _usual_inputs(split: Dataset) -> tuple[str, ...]:
    usual = {name for media in MEDIA for name in media.columns}
    for column in sorted(split.column_names, key=lambda name: name not in usual):
        if _media(split, column) is not None:
            return (column,)
    for columns in TEXT_NAMES:
        if all(column in split.column_names for column in columns):
            return columns
    raise DataError(
        f"no image, audio or text column among {shown_columns(split)}: set image_column, audio_column or text_column",
        arguments=("image_column", "audio_column", "text_column"),
    )
