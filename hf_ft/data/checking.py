"""Checks of data before anything is trained on them: duplicates, contradicting labels, rare classes, shared groups."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from hf_ft.data.check_results import DataChecks, Duplicates, Kind, Sample
from hf_ft.data.columns import ROW, Columns, find_columns, values_of
from hf_ft.data.duplicates import equal_sets, near_sets
from hf_ft.data.groups import check_group_column, shared_groups
from hf_ft.data.images import check_images
from hf_ft.data.media import MEDIA
from hf_ft.data.prints import Print, Prints, text_print
from hf_ft.data.progress import bar


def check_data(
    splits: DatasetDict,
    columns: Columns | None = None,
    *,
    group_column: str | None = None,
    prints: Prints | None = None,
) -> DataChecks:
    """Find duplicates within and between splits, labels that contradict each other, rare classes and shared groups.

    Every sample is read once; less than 1 KB of each is kept. Images are equal if they have the same pixels (a JPEG
    file of more than 100 KB is decoded at an eighth of its size), sounds if they have the same samples, and texts if
    they differ only in case and spaces. Images are nearly equal if they differ by compression, size or contrast, and
    texts of ten words or more if they share about 80% of their sequences of three words. The result is the same on each
    call.

    Args:
        splits: such as ``train``, ``validation`` and ``test``, as returned by :func:`~hf_ft.data.load_splits`; not
            streamed.
        columns: by default, those that :func:`~hf_ft.data.find_columns` finds.
        group_column: column of what several rows have in common, such as a patient.
        prints: fingerprints taken earlier by :func:`~hf_ft.data.check_images`.

    Raises:
        DataError: if there are samples that cannot be read, columns are not found, or there is no group column.
    """
    columns = columns or find_columns(splits)
    check_group_column(next(iter(splits.values())), group_column)
    known = {} if prints is None else prints.splits
    new = DatasetDict({name: split for name, split in splits.items() if name not in known})
    known = {**known, **take_prints(new, columns).splits}
    found = quick_checks(splits, columns, group_column)
    return replace(found, duplicates=_found(splits, columns, [one for name in splits for one in known[name]]))


def take_prints(splits: DatasetDict, columns: Columns) -> Prints:
    """The fingerprints of all samples.

    Raises:
        DataError: if one cannot be read.
    """
    prints = Prints()
    if any(media.task == columns.task for media in MEDIA):
        check_images(splits, columns, prints=prints)
        return prints
    with bar("reading texts", sum(map(len, splits.values())), unit=" texts") as shown:
        for name, split in splits.items():
            prints.splits[name] = _text_prints(split, columns, shown.update)
    return prints


def _text_prints(split: Dataset, columns: Columns, advance: Callable[[int], Any]) -> list[Print]:
    found = []
    for batch in split.with_format(None).select_columns(list(columns.inputs)).iter(1000):
        for texts in zip(*(batch[column] for column in columns.inputs), strict=True):
            found.append(text_print(["" if text is None else str(text) for text in texts]))
        advance(len(batch[columns.inputs[0]]))
    return found


def quick_checks(splits: DatasetDict, columns: Columns, group_column: str | None) -> DataChecks:
    """Classes and groups, for which no sample is opened."""
    found = DataChecks({name: len(split) for name, split in splits.items()})
    if columns.problem_type == "single_label_classification":
        counts = {name: Counter(_labels(split, columns)) for name, split in splits.items()}
        present = set().union(*counts.values()) - {None}
        names = [name for name in columns.names if name in present]
        absent = {
            split: tuple(name for name in names if not count[name])
            for split, count in counts.items()
            if count[None] < len(splits[split])
        }
        single = tuple(name for name in names if "train" in counts and counts["train"][name] == 1)
        found = replace(found, absent={split: names for split, names in absent.items() if names}, single=single)
    return found if group_column is None else replace(found, shared=shared_groups(splits, group_column))


def _labels(split: Dataset, columns: Columns) -> list[str | None]:
    """The label of each sample as text; None for those without one."""
    if columns.label not in split.column_names:
        return [None] * len(split)
    values = values_of(split, columns.label)
    if columns.problem_type == "single_label_classification":
        numbers = [columns.index.get(v) if columns.index is not None else v for v in values]
        return [columns.names[n] if n is not None and 0 <= n < len(columns.names) else None for n in numbers]
    return [None if value is None or value != value else str(value) for value in values]


def _found(splits: DatasetDict, columns: Columns, prints: Sequence[Print]) -> tuple[Duplicates, ...]:
    """The sets of duplicates among the samples of all splits in order."""
    kinds: list[tuple[Kind, list[np.ndarray]]] = [("same", equal_sets(prints)), ("near", near_sets(prints))]
    wanted = sorted({int(row) for _, sets in kinds for rows in sets for row in rows})
    samples = dict(zip(wanted, _samples(splits, columns, wanted), strict=True))
    return tuple(Duplicates(kind, tuple(samples[int(row)] for row in rows)) for kind, sets in kinds for rows in sets)


def _samples(splits: DatasetDict, columns: Columns, rows: Sequence[int]) -> list[Sample]:
    """The samples with these numbers, counted over all splits in order."""
    found, start = [], 0
    for name, split in splits.items():
        own = [row - start for row in rows if start <= row < start + len(split)]
        start += len(split)
        some = split.select(own)
        numbers = values_of(some, ROW) if ROW in some.column_names else own
        files, labels = _files(some, columns), _labels(some, columns)
        found += [
            Sample(name, int(number), file, label) for number, file, label in zip(numbers, files, labels, strict=True)
        ]
    if not any(os.path.isabs(one.file) for one in found):
        return found
    folder = _common_folder(splits, columns)
    return [
        replace(one, file=os.path.relpath(one.file, folder).replace(os.sep, "/")) if os.path.isabs(one.file) else one
        for one in found
    ]


def _common_folder(splits: DatasetDict, columns: Columns) -> str:
    """The folder that all files share, so that no name in a list reveals where the data are stored."""
    folders = set()
    for split in splits.values():
        column = split.data.column(columns.inputs[0])
        paths = pc.struct_field(column, "path") if pa.types.is_struct(column.type) else column
        folders |= {os.path.dirname(path) for path in paths.to_pylist() if path and os.path.isabs(path)}
    return os.path.commonpath(folders) if folders else ""


def _files(split: Dataset, columns: Columns) -> list[str]:
    """The path of each sample; empty if it is not a file."""
    media = next((media for media in MEDIA if media.task == columns.task), None)
    if media is None or not len(split):
        return [""] * len(split)
    values = values_of(split.cast_column(columns.inputs[0], media.unopened), columns.inputs[0])
    return [value if isinstance(value, str) else (value or {}).get("path") or "" for value in values]
