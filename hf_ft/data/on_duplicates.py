"""The handling of duplicates, and the findings of an earlier run in the same data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from datasets import Dataset, DatasetDict

from hf_ft.data.check_results import DataChecks, Duplicates, to_drop
from hf_ft.data.checking import check_data, quick_checks
from hf_ft.data.columns import ROW, Columns, values_of
from hf_ft.data.media import MEDIA
from hf_ft.data.prints import Prints
from hf_ft.errors import CheckpointError, DataError

OnDuplicates = Literal["warn", "drop", "refuse", "ignore"]
VERSION = 1  # version of what is compared and how, part of the keys


def checked(
    splits: DatasetDict,
    columns: Columns,
    on_duplicates: OnDuplicates,
    *,
    group_column: str | None = None,
    prints: Prints | None = None,
    folder: Path | None = None,
    not_compared: str = "",
) -> tuple[DatasetDict, DataChecks]:
    """Check data, or reuse what an earlier call found in the same data, and handle duplicates as requested.

    Args:
        on_duplicates: ``warn`` only reports them; ``drop`` drops the training samples of :func:`to_drop`; ``refuse``
            raises; ``ignore`` does not search for them.
        folder: where :meth:`DataChecks.save` of an earlier call may have written; with ``refuse``, the list of what is
            refused is written there. Otherwise nothing is written: save what is returned once all else is in order.
        not_compared: why duplicates are not searched for, if they are not.

    Returns:
        The splits, and the findings.

    Raises:
        DataError: as :func:`check_data`; with ``refuse`` if there are duplicates other than nearly equal samples of
            one split and one label; with ``drop`` if no training sample remains.
    """
    if on_duplicates not in get_args(OnDuplicates):
        choices = ", ".join(get_args(OnDuplicates))
        raise DataError(f"on_duplicates={on_duplicates!r} is unknown: choose one of {choices}.")
    not_compared = "duplicates are ignored" if on_duplicates == "ignore" else not_compared
    if not_compared:
        found = replace(quick_checks(splits, columns, group_column), not_compared=not_compared)
    else:
        keys = {} if folder is None else data_keys(splits, columns, group_column)
        earlier = None if folder is None else recorded(folder, keys)
        if earlier is None:
            found = check_data(splits, columns, group_column=group_column, prints=prints)
        else:
            found = replace(quick_checks(splits, columns, group_column), duplicates=earlier)
        found = replace(found, keys=keys)
        if on_duplicates == "drop":
            splits, found = _dropped(splits, columns, found)
    if on_duplicates == "refuse":
        _refuse(found, folder)
    return splits, found


def recorded(folder: Path, keys: Mapping[str, str]) -> tuple[Duplicates, ...] | None:
    """The duplicates that an earlier call found in the same data; None if there was none, or the data differ."""
    try:
        found = DataChecks.load(folder)
    except (CheckpointError, OSError):
        return None
    return found.duplicates if dict(found.keys) == dict(keys) else None


def data_keys(splits: Mapping[str, Dataset], columns: Columns, group_column: str | None) -> dict[str, str]:
    """What identifies the data of each split: texts, labels and groups, and the paths, sizes and times of files."""
    media = next((media for media in MEDIA if media.task == columns.task), None)
    keys = {}
    for name, split in splits.items():
        wanted = dict.fromkeys([ROW, columns.label, group_column, *columns.inputs])  # groups may be files
        split = split.with_format(None).select_columns([c for c in wanted if c in split.column_names])
        split = split if media is None else split.cast_column(columns.inputs[0], media.unopened)
        seen = hashlib.sha256(repr((VERSION, len(split), split.column_names)).encode())
        for batch in split.iter(1000):
            for column, values in batch.items():
                values = map(_identity, values) if media is not None and column in columns.inputs else values
                seen.update(repr(list(values)).encode("utf-8", "replace"))
        keys[name] = seen.hexdigest()[:16]
    return keys


def _identity(value: Any) -> Any:
    """What identifies a file without opening it."""
    value = {"path": value, "bytes": None} if isinstance(value, str) else value or {}
    if value.get("bytes") is not None:
        return hashlib.blake2b(value["bytes"], digest_size=16).hexdigest()
    path = value.get("path")
    if path is None or not os.path.isfile(path):
        return path
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


def _dropped(splits: DatasetDict, columns: Columns, found: DataChecks) -> tuple[DatasetDict, DataChecks]:
    rows = to_drop(found.duplicates)
    if not rows:
        return splits, found
    train = splits["train"]
    numbers = values_of(train, ROW) if ROW in train.column_names else range(len(train))
    kept = [place for place, number in enumerate(numbers) if number not in rows]
    if not kept:
        raise DataError(
            "all training samples are duplicates that on_duplicates='drop' would drop: set on_duplicates='warn'",
            arguments=("on_duplicates",),
        )
    splits = DatasetDict({**splits, "train": train.select(kept)})
    left = quick_checks(splits, columns, None)  # a class may have lost its last sample
    return splits, replace(found, dropped=len(train) - len(kept), absent=left.absent, single=left.single)


def _refuse(found: DataChecks, folder: Path | None) -> None:
    if any(one.disagree or one.kind == "same" or len(one.splits) > 1 for one in found.duplicates):
        listed = f"; {found.save(folder)} lists them" if folder is not None else ""
        raise DataError(
            f"{'; '.join(found.sentences())}{listed}. Remove them, or set on_duplicates='drop', or 'warn'",
            arguments=("on_duplicates",),
        )
