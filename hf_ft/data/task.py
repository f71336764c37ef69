"""A data set with everything needed to train on it, before and after processing for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from hf_ft.data.check_results import DataChecks
from hf_ft.data.columns import Columns
from hf_ft.data.groups import groups_of
from hf_ft.data.in_memory import held
from hf_ft.data.info import DataInfo
from hf_ft.data.prepare import collate, prepare, usual_length
from hf_ft.data.sounds import SECONDS
from hf_ft.errors import OptionError


@dataclass(frozen=True)
class Data:
    """A data set with its columns and how to process it.

    Attributes:
        splits: ``train``, ``validation``, and optionally ``test`` and ``ood`` (out of distribution, same classes).
        columns: the columns to read.
        name: display name.
        augment: augmentation of training images, from ``hf_ft.data.AUGMENTATIONS``.
        max_length: maximum text length in tokens; by default that of the model, at most 512.
        seconds: length to which sounds are cut.
        source: source data, for strategies that use them.
        source_columns: the columns to read from the source data.
        group_column: column of what several rows have in common; whatever is held out keeps such rows together.
        checks: the findings of the data checks, for the report.
        skipped: number of unreadable rows by split.
        notices: licences and sources, for the report.
        notes: remarks for the report, such as which splits were carved.

    Raises:
        OptionError: if ``max_length`` is less than 1.
    """

    splits: DatasetDict
    columns: Columns
    name: str = "data"
    augment: str = "none"
    max_length: int | None = None
    seconds: float = SECONDS
    source: Dataset | None = None
    source_columns: Columns | None = None
    group_column: str | None = None
    checks: DataChecks | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise OptionError(f"max_length={self.max_length} must be at least 1 token, or None.")

    @property
    def groups(self) -> np.ndarray | None:
        """The number of each training row's group, (n,); None without groups."""
        return groups_of(self.splits["train"], self.group_column)

    @property
    def info(self) -> DataInfo:
        """What the card of a model trained on it says about it."""
        info = DataInfo.of(self.name, {name: len(split) for name, split in self.splits.items()}, self.notices)
        return replace(info, augment=self.augment)


@dataclass(frozen=True)
class Processed:
    """Data processed for a model.

    Attributes:
        splits: map-style data sets by split.
        collate: the collator.
        plain: the training samples without augmentation; None if ``train`` is not augmented.
        source: the source data, if any.
    """

    splits: dict[str, Any]
    collate: Callable[[list[Any]], Any]
    plain: Any = None
    source: Any = None


def process(data: Data, model: Any, processor: Any, *, in_memory: bool = False) -> Processed:
    """Process all splits, and the source data, for a model.

    Args:
        processor: the image processor, feature extractor or tokenizer of the model.
        in_memory: read samples that do not change between reads once, and keep them.
    """
    length = data.max_length or usual_length(model, processor)

    def ready(splits: DatasetDict, columns: Columns, augment: str) -> dict[str, Any]:
        augmented = {"train"} if columns.task == "image" and augment != "none" else set()
        prepared = prepare(splits, processor, columns, augment, length, data.seconds)
        return {name: held(split) if in_memory and name not in augmented else split for name, split in prepared.items()}

    plain = source = None
    if data.augment != "none":
        plain = ready(DatasetDict({"train": data.splits["train"]}), data.columns, "none")["train"]
    if data.source is not None and data.source_columns is not None:
        source = ready(DatasetDict({"train": data.source}), data.source_columns, data.augment)["train"]
    return Processed(
        ready(data.splits, data.columns, data.augment),
        collate(processor),
        plain,
        source,
    )
