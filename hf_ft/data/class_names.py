"""Class names as people write them: with spaces around them, in two Unicode forms, or as lists written as text."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, List, Value
from transformers.utils import logging

from hf_ft.data.columns import is_text, values_of
from hf_ft.errors import DataError

SEVERAL = re.compile(r"\s*[,;|]\s*")  # between labels that are written into one field
FEW = 10  # values that are as likely classes as amounts
SHOWN = 3  # in a message
logger = logging.get_logger(__name__)


def plain(name: str) -> str:
    """A class name without spaces around it, and with composed letters: file systems and editors differ in these."""
    return unicodedata.normalize("NFC", name).strip()


def with_plain_labels(split: Dataset, label: str | None) -> Dataset:
    """The split with plain class names; a label of spaces is missing."""
    if label is None or label not in split.column_names or not _holds_names(split, label):
        return split
    values = values_of(split, label)
    if all(_plain(value) == value for value in (set(values) if is_text(split, label) else values)):
        return split
    return split.map(lambda some: {label: [_plain(value) for value in some]}, batched=True, input_columns=label)


def check_names(train: Dataset, label: str | None) -> None:
    """Warn about classes that may be the same or several, and about classes that may be amounts.

    Raises:
        DataError: if labels are lists written as text.
    """
    if label is None or label not in train.column_names:
        return
    feature = train.features[label]
    if isinstance(feature, ClassLabel):
        _warn_same(feature.names)
    elif is_text(train, label):
        names = sorted({value for value in values_of(train, label) if value is not None})
        _check_lists(names, label)
        _warn_same(names)
        _warn_several(names)
    elif isinstance(feature, Value) and "float" in feature.dtype:
        _warn_whole(values_of(train, label), label)


def _holds_names(split: Dataset, label: str) -> bool:
    feature = split.features[label]
    return is_text(split, label) or (isinstance(feature, List) and feature.feature == Value("string"))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return plain(value) or None if isinstance(value, str) else value


def _check_lists(names: Sequence[str], label: str) -> None:
    if names and all(name.startswith("[") and name.endswith("]") for name in names):
        raise DataError(
            f"column {label!r} holds lists written as text, such as {names[0]!r}: for several labels per row, write "
            "real lists into a jsonl or parquet file",
            arguments=("label_column",),
        )


def _warn_same(names: Sequence[str]) -> None:
    groups: Mapping[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.casefold()].append(name)
    same = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    if same:
        logger.warning(f"classes that differ only in case: {_shown(same)}. They are kept apart.")


def _warn_several(names: Sequence[str]) -> None:
    several = [
        repr(name) for name in names if len(parts := SEVERAL.split(name)) > 1 and all(part in names for part in parts)
    ]
    if several:
        logger.warning(
            f"classes that look like several labels: {_shown(several)}. Each is one class; for several labels per row, "
            "write lists into a jsonl or parquet file."
        )


def _warn_whole(values: Sequence[float | None], label: str) -> None:
    distinct = {value for value in values if value is not None and value == value}
    if 1 < len(distinct) <= min(FEW, len(values) / 2) and all(value.is_integer() for value in distinct):
        logger.warning(
            f"column {label!r} holds the floats {_shown([f'{value:g}' for value in sorted(distinct)])}: they are "
            "treated as amounts, for regression. If they are classes, write them as integers."
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
