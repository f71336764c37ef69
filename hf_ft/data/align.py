"""Read further data in the way of the data set that they come with, and align their labels with its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict

from hf_ft.data.columns import Columns, find_columns, shown_columns, usual_label
from hf_ft.data.files import is_encoded
from hf_ft.data.load import load_split
from hf_ft.errors import DataError


def load_further(source: str, split: str, encoding: str | None) -> Dataset:
    """Read one split of further data, with the encoding of the main data if there is anything to decode.

    Raises:
        DataError: if the source cannot be read or has no such split.
    """
    return load_split(source, split, encoding=encoding if encoding and is_encoded(source) else None)


def find_like(source: str, splits: DatasetDict, columns: Columns) -> Columns:
    """The columns of further data: those named as in the main data, or else the usual ones.

    Raises:
        DataError: if there is no label column, or a column is unsuitable.
    """
    rows = next(iter(splits.values()))
    named: dict[str, str] = {}
    if set(columns.inputs) <= set(rows.column_names):
        named[f"{columns.task}_column"] = ",".join(columns.inputs)
    if columns.label in rows.column_names:
        named["label_column"] = columns.label
    elif usual_label(rows) is None:
        raise DataError(
            f"{source} has no label column among {shown_columns(rows)}: name it {columns.label!r}, as in the main data."
        )
    return find_columns(splits, **named)


def other_distribution(source: str, split: str | None, columns: Columns, encoding: str | None = None) -> Dataset:
    """Load a second test set with the columns of the first, matching classes by name.

    Args:
        encoding: encoding of csv and tsv files.

    Raises:
        DataError: if it holds another kind of data, or a class that the model does not know.
    """
    rows = _first_split(source, ("test", "train") if split is None else (split,), encoding)
    theirs = find_like(source, DatasetDict({"test": rows}), columns)
    unknown = [name for name in theirs.names if name not in columns.names]
    if theirs.task != columns.task or unknown or theirs.problem_type != columns.problem_type:
        what = f"the class {unknown[0]!r}" if unknown else f"{theirs.task}, {theirs.problem_type}"
        raise DataError(
            f"{source} contains {what}, but the model's data are {columns.task} of {columns.problem_type} with the "
            f"classes {', '.join(columns.names[:10])}: use data with the same classes."
        )
    labels: Sequence[Any] = theirs.encode(rows.with_format(None)[theirs.label][:])
    if columns.problem_type == "single_label_classification":
        labels = [columns.names.index(theirs.names[label]) for label in labels]
    kept = rows.select_columns(list(theirs.inputs)).rename_columns(
        {old: new for old, new in zip(theirs.inputs, columns.inputs, strict=True) if old != new}
    )
    if columns.index is not None:  # labels are looked up by value
        values = {number: value for value, number in columns.index.items()}
        return kept.add_column(columns.label, [values[label] for label in labels])
    made = kept.add_column(columns.label, list(labels))
    named = columns.problem_type == "single_label_classification"
    return made.cast_column(columns.label, ClassLabel(names=list(columns.names))) if named else made


def _first_split(source: str, names: Sequence[str], encoding: str | None) -> Dataset:
    for name in names:
        try:
            return load_further(source, name, encoding)
        except DataError:
            if name == names[-1]:
                raise
    raise DataError(f"{source} has no splits.")
