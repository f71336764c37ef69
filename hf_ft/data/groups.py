"""Groups of samples that belong together, such as all images of a patient: whole groups are held out, never parts.

A model that is evaluated on patients that it has seen in training has scores that say little about new patients.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from hf_ft.data.columns import shown_columns, values_of
from hf_ft.data.streams import is_map_style
from hf_ft.errors import DataError, OptionError


@dataclass(frozen=True)
class SharedGroups:
    """Groups that two splits have in common.

    Attributes:
        splits: the two.
        groups: number of the groups.
        rows: number of their rows in each of the two splits.
    """

    splits: tuple[str, str]
    groups: int
    rows: tuple[int, int]

    def __str__(self) -> str:
        (first, second), groups = self.splits, f"{self.groups:,} group{'s' if self.groups > 1 else ''}"
        return f"{first} and {second} share {groups} ({self.rows[0]:,} and {self.rows[1]:,} samples)"


def check_group_column(split: Dataset, column: str | None, label: str | None = None) -> None:
    """Check that the column can define groups.

    Args:
        label: the label column, if known.

    Raises:
        DataError: if there is no such column, its values cannot be compared, or they are the labels.
    """
    if column is None:
        return
    if column == label:
        raise DataError(
            f"column {column!r} holds the labels, so whole classes would be held out: set group_column to another, "
            "or leave it out",
            arguments=("group_column",),
        )
    if column not in split.column_names:
        raise DataError(
            f"there is no column {column!r}, only {shown_columns(split)}: set group_column", arguments=("group_column",)
        )
    value = next((value for value in values_of(split, column) if value is not None), None)
    if isinstance(value, (list, dict)):
        raise DataError(
            f"column {column!r} is of type {split.features[column]}, which cannot define groups: set group_column",
            arguments=("group_column",),
        )


def group_numbers(values: Sequence[Any]) -> np.ndarray:
    """A number for each row, (n,), the same within a group.

    A row without a value (None, NaN, or pandas' NaT and NA) is a group of its own.
    """
    known: dict[Any, int] = {}
    keys = ((row,) if _is_missing(value) else value for row, value in enumerate(values))
    return np.asarray([known.setdefault(key, len(known)) for key in keys], int)


def _is_missing(value: Any) -> bool:
    return (
        value is None or (value == value) is not True
    )  # values that do not equal themselves: NaN, and pandas' NaT and NA


def groups_of(split: Dataset, column: str | None) -> np.ndarray | None:
    """The number of each row's group, (n,); None without groups."""
    return None if column is None or column not in split.column_names else group_numbers(values_of(split, column))


def given_groups(wanted: Any, dataset: Any) -> np.ndarray | None:
    """The number of each training sample's group, (n,), from values given by the user; None without any.

    Raises:
        OptionError: if there is not one for each sample.
    """
    if wanted is None:
        return None
    if not is_map_style(dataset):
        raise OptionError("groups need a train_dataset with rows by index, not a stream: leave them out.")
    try:
        # Tensors are equal only to themselves, including those of a formatted data set.
        values = [value.tolist() if hasattr(value, "tolist") else value for value in wanted]
        if len(values) != len(dataset):
            raise OptionError(
                f"groups has {len(values)} values for {len(dataset)} training samples: give one for each."
            )
        return group_numbers(values)
    except TypeError as error:
        raise OptionError(f"groups must be values that can be compared, such as numbers or names: {error}.") from error


def shared_groups(splits: Mapping[str, Dataset], column: str) -> tuple[SharedGroups, ...]:
    """The groups that splits have in common, by pair of splits; a split without the column has none."""
    values = {name: values_of(split, column) for name, split in splits.items() if column in split.column_names}
    found = []
    for first, second in itertools.combinations(values, 2):
        shared = {*values[first]} & {*values[second]} - {None}
        if shared:
            rows = [sum(value in shared for value in values[name]) for name in (first, second)]
            found.append(SharedGroups((first, second), len(shared), (rows[0], rows[1])))
    return tuple(found)
