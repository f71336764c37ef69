"""Cross-validation for few labelled samples: parts of them take turns as validation.

On a validation split of 30 images, one image is worth three points, and the best of several settings is mostly the
luckiest. In cross-validation, every labelled sample is used for validation once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch.utils.data import Subset

from hf_ft.data.columns import Columns
from hf_ft.data.groups import groups_of
from hf_ft.data.task import Data, Processed
from hf_ft.errors import OptionError
from hf_ft.splits import held_out_parts, most_parts

FEW = 200  # labelled samples; with fewer, parts of them take turns
PARTS = 5


@dataclass(frozen=True)
class Folds:
    """How the training and validation samples are divided.

    Attributes:
        pool: the training samples, followed by the validation samples.
        parts: rows of the pool that are used for validation in each fold; the others are used for training.
    """

    pool: Dataset
    parts: tuple[np.ndarray, ...]

    def rows(self, fold: int) -> tuple[list[int], list[int]]:
        """The rows for training and those for validation."""
        own = self.parts[fold]
        return np.setdiff1d(np.arange(len(self.pool)), own).tolist(), own.tolist()

    def groups(self, data: Data, fold: int) -> np.ndarray | None:
        """The groups of the training rows; None without groups."""
        numbers = groups_of(self.pool, data.group_column)
        return None if numbers is None else numbers[self.rows(fold)[0]]

    def first(self, data: Data) -> Data:
        """The data divided as in the first fold."""
        train, validation = self.rows(0)
        splits = {**data.splits, "train": self.pool.select(train), "validation": self.pool.select(validation)}
        note = (
            f"validation: {len(self.parts)} parts of the {len(self.pool)} labelled samples (train and validation) take "
            "turns, and the model is trained on the others"
        )
        return replace(data, splits=DatasetDict(splits), notes=(*data.notes, note))

    def pooled(self, data: Data) -> Data:
        """All labelled samples as validation, and as training data too if these are augmented."""
        splits = {**data.splits, "train": self.pool, "validation": self.pool}
        if data.augment == "none":
            splits.pop("train")
        return replace(data, splits=DatasetDict(splits))

    def select(self, pooled: Processed, fold: int) -> tuple[dict[str, Any], Any]:
        """The splits of a fold, and the training samples without augmentation if they are augmented."""
        train, validation = self.rows(fold)
        augmented = pooled.splits.get("train")
        as_is = Subset(pooled.splits["validation"], train)
        splits = {
            **pooled.splits,
            "train": as_is if augmented is None else augmented.select(train),
            "validation": Subset(pooled.splits["validation"], validation),
        }
        return splits, None if augmented is None else as_is


def folds_of(data: Data, count: int | None) -> Folds | None:
    """Divide the training and validation samples, with the same class proportions everywhere.

    A class with a single sample is always in training. Groups of samples (:attr:`Data.group_column`) stay whole; those
    with a class that no other group has are always in training.

    Args:
        count: number of folds; None for :data:`PARTS` if there are fewer than :data:`FEW` such samples. With one fold,
            validation stays as it is.

    Raises:
        OptionError: if there are fewer samples than folds, or the splits have different columns.
    """
    train, validation = data.splits["train"], data.splits["validation"]
    total = len(train) + len(validation)
    if count == 1 or (count is None and total >= FEW):
        return None
    try:
        pool = concatenate_datasets([split.with_format(None) for split in (train, validation)])
    except (ValueError, TypeError) as error:
        if count is None:
            return None
        raise OptionError(f"folds={count}: train and validation have different columns; set folds=1.") from error
    labels, groups = class_of_rows(pool, data.columns), groups_of(pool, data.group_column)
    units = most_parts(labels, groups)
    if count is None and groups is not None:
        count = min(PARTS, units)
        if count < 2:
            return None
    count = count or PARTS
    if units < count:
        what = "samples" if groups is None else "groups"
        raise OptionError(f"folds={count} exceeds the {units} {what} that can be used for validation: set folds=1.")
    return Folds(pool, held_out_parts(labels, count, groups))


def class_of_rows(split: Dataset, columns: Columns) -> np.ndarray:
    """The class of each row; zeros if rows have no single class."""
    if columns.problem_type != "single_label_classification":
        return np.zeros(len(split), dtype=int)
    return np.asarray([int(value) for value in columns.encode(split.with_format(None)[columns.label][:])])
