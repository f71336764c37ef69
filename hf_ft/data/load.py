"""Load data from any supported source into splits that the Trainer can read.

:func:`load_splits` reads the data, :func:`find_columns` finds inputs and labels, :func:`check_images` finds unreadable
images, and :func:`prepare` with :func:`collate` turn rows into batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Value
from transformers.utils import logging

from hf_ft.data.class_names import check_names, with_plain_labels
from hf_ft.data.columns import ROW, unlabelled, usual_label, values_of
from hf_ft.data.files import read_files
from hf_ft.data.groups import check_group_column, group_numbers
from hf_ft.data.media import SOUNDS
from hf_ft.data.split_names import USUAL, Role, candidates
from hf_ft.data.unknown_classes import OnUnknown, known_rows
from hf_ft.errors import DataError
from hf_ft.splits import absent_classes, grouped_share, stratified_rows

VALIDATION_NAMES, TEST_NAMES = USUAL["validation"], USUAL["test"]
logger = logging.get_logger(__name__)


def load_splits(
    source: str,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_fraction: float = 0.2,
    test_fraction: float | None = None,
    labelled: int | None = None,
    max_train_samples: int | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    unknown_classes: OnUnknown = "refuse",
    encoding: str | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Read a data set and determine its splits: ``train``, ``validation`` and, if available, ``test``.

    Args:
        source: a short name of :mod:`hf_ft.zoo`; a folder of class folders with images or sounds, or of split folders
            with these; a csv, tsv, json, jsonl or parquet file, or a folder of such files; a folder written by
            ``save_to_disk``; or a Hub id.
        validation_split: by default the usual names are tried; if there is none, ``validation_fraction`` of the
            training rows are held out, stratified. The test split is never used for it.
        test_fraction: if there is no labelled test split, hold out this fraction of the training rows as one, before
            any other rows are drawn. It does not depend on ``labelled``.
        labelled: total number of rows for training and validation, drawn stratified by class: validation rows are
            labelled data as well. A validation split of the source provides ``validation_fraction`` of them.
        max_train_samples: maximum number of training rows, not counting validation rows.
        unknown_classes: whether to refuse or to drop rows of a class that no training row has.
        encoding: encoding of csv and tsv files (default: UTF-8).
        label_column: column to stratify by (default: the one found by :func:`find_columns`).
        group_column: column of what several rows have in common, such as a patient: whole
            groups are held out, so that no group is on both sides. Sizes then match the requested ones only roughly.

    Raises:
        DataError: if the source cannot be read, a split is missing, or there are too few rows.
    """
    if max_train_samples is not None and max_train_samples < 1:
        raise DataError(f"max_train_samples={max_train_samples} must be at least 1")
    names: dict[Role, str | None] = {"train": train_split, "validation": validation_split, "test": test_split}
    parts = _given(source, config_name, names, encoding)
    label = label_column or usual_label(parts["train"])
    parts = {name: with_plain_labels(part, label) for name, part in parts.items()}
    check_names(parts["train"], label)
    parts = known_rows(parts, label, unknown_classes)
    whole = parts["train"]
    check_group_column(whole, group_column, label)
    by = _stratify_by(whole, label)
    if test_fraction is not None and "test" in parts and not _has_labels(parts["test"], label, whole):
        logger.warning("the test split has rows without a label: part of train is held out instead")
        del parts["test"]
    given = set(parts) - {"train"}
    if "test" not in given and test_fraction is not None:
        parts |= _carve(parts["train"], "test", test_fraction, _apart(seed, 1), by, group_column)
    if labelled is not None:
        parts |= _limit(parts, labelled, validation_fraction, _apart(seed, 2), by)
    if "validation" not in given:
        parts |= _carve(parts["train"], "validation", validation_fraction, seed, by, group_column)
    if max_train_samples is not None and max_train_samples < len(parts["train"]):
        parts |= _drawn(parts["train"], {"train": max_train_samples}, seed, by)
    parts = {name: parts[name] for name in names if name in parts}
    _warn_absent(whole, {name: part for name, part in parts.items() if name not in given}, by)
    return DatasetDict(parts)


def load_split(
    source: str, split: str | None = "train", *, config_name: str | None = None, encoding: str | None = None
) -> Dataset:
    """Read one split of a data set without further processing (see :func:`load_splits`).

    Args:
        split: None for the only one, or else the test split, or else the validation split, by their usual names.

    Raises:
        DataError: if the source cannot be read or has no such split.
    """
    found = read_files(source, config_name, split or "train", encoding)
    if split is None:
        split = _held_out(source, found)
    role: Role = "test" if split == "test" else "train"
    split = str(_usual(found, role, split, ())) if split not in found else split
    if split not in found:
        raise DataError(f"{source!r} has no split {split!r}, only {list(found)}: choose one of these")
    return _numbered(found[split])


def _held_out(source: str, found: Collection[str]) -> str:
    """The split on which a model is evaluated: the only one, or by its name."""
    names = list(found) if len(found) == 1 else candidates(found, "test") or candidates(found, "validation")
    if len(names) != 1:
        splits = ", ".join(found)
        raise DataError(f"{source!r} has the splits {splits}: choose one of these with split", arguments=("split",))

    return names[0]


def _given(
    source: str, config_name: str | None, names: Mapping[Role, str | None], encoding: str | None
) -> dict[str, Dataset]:
    """The splits of the source by role, under the given names or else the usual ones."""
    found = read_files(source, config_name, names["train"] or "train", encoding)
    return {role: _numbered(found[name]) for role, name in split_names(source, list(found), names).items()}


def split_names(source: str, found: Collection[str], names: Mapping[Role, str | None]) -> dict[Role, str]:
    """The splits found in a source by role: those of the given names, or else of the usual ones.

    Raises:
        DataError: if one is missing, or several may be meant.
    """
    parts: dict[Role, str] = {}
    for key, wanted in names.items():
        name = wanted if wanted in found else _usual(found, key, wanted, names.values())
        if name is not None and name not in found:
            wrong = f"{key}_split"
            raise DataError(f"{source!r} has no split {name!r}, only {list(found)}: set {wrong}", arguments=(wrong,))
        if name is not None:
            parts[key] = name
    return parts


def _usual(found: Collection[str], role: Role, wanted: str | None, others: Iterable[str | None]) -> str | None:
    """The split of this role by its usual names, if no other name was given.

    Raises:
        DataError: if there are several.
    """
    if wanted not in (None, role):
        return wanted
    names = candidates([name for name in found if name not in others], role)
    if len(names) > 1:
        argument = f"{role}_split"
        raise DataError(f"{' and '.join(names)} could each be the {role} split: set {argument}", arguments=(argument,))
    return names[0] if names else wanted


def _numbered(part: Dataset) -> Dataset:
    for name, feature in part.features.items():
        if isinstance(feature, Audio):
            part = part.cast_column(name, SOUNDS.unopened)
    return part if ROW in part.column_names else part.add_column(ROW, np.arange(len(part)))


def _has_labels(split: Dataset, label: str | None, train: Dataset) -> bool:
    return label in split.column_names and not unlabelled(split, str(label), train)


def _apart(seed: int, draw: int) -> int:
    """Derive a separate seed for each kind of draw, so that no draw repeats another's order."""
    return int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])


def _carve(
    train: Dataset, name: str, fraction: float, seed: int, by: str | None, group_column: str | None
) -> dict[str, Dataset]:
    """Hold out a fraction of the training rows, or of their groups."""
    size = round(len(train) * fraction)
    if not 0 < size < len(train):
        change = "larger" if size == 0 else "smaller"
        fix = f"give more rows, set a {change} {name}_fraction"
        fix = fix if 0 < fraction < 1 else f"set {name}_fraction between 0 and 1"
        raise DataError(
            f"{name}_fraction={fraction} of {len(train)} rows leaves a split empty: {fix}, or set {name}_split "
            f"(columns: {', '.join(sorted({*train.column_names} - {ROW}))})",
            arguments=(f"{name}_fraction", f"{name}_split"),
        )
    if by is not None and max(Counter(values_of(train, by)).values()) == 1:
        raise DataError(
            f"each of the {len(train):,} rows has a different class in column {by!r}, so none can be held out for "
            f"{name}: set {name}_split, or give the column of the classes with label_column",
            arguments=(f"{name}_split", "label_column"),
        )
    logger.info(f"{size} of {len(train)} training rows are held out for {name}")
    if group_column is not None:
        return _carve_groups(train, name, fraction, seed, by, group_column)
    return _drawn(train, {"train": len(train) - size, name: size}, seed, by)


def _carve_groups(
    train: Dataset, name: str, fraction: float, seed: int, by: str | None, group_column: str
) -> dict[str, Dataset]:
    groups = group_numbers(values_of(train, group_column))
    if len(set(groups.tolist())) < 2:
        raise DataError(
            f"all {len(train):,} training rows have the same {group_column!r}, so no group can be held out for "
            f"{name}: set {name}_split, or leave out group_column",
            arguments=(f"{name}_split", "group_column"),
        )
    held_out = grouped_share(_labels(train, by), groups, fraction, seed)
    order = np.random.default_rng(seed).permutation(len(train))
    drawn = np.isin(order, held_out)
    return {"train": train.select(order[~drawn]), name: train.select(order[drawn])}


def _limit(parts: dict[str, Dataset], labelled: int, fraction: float, seed: int, by: str | None) -> dict[str, Dataset]:
    """Draw this total number of labelled rows: from ``train``, and from ``validation`` if there is such a split."""
    sizes = {"train": labelled}
    if "validation" in parts:
        sizes["validation"] = min(round(labelled * fraction), len(parts["validation"]))
        sizes["train"] -= sizes["validation"]
    if labelled < 2 or min(sizes.values()) < 1 or sizes["train"] > len(parts["train"]):
        rows = ", ".join(f"{len(parts[name])} of {name}" for name in sizes)
        raise DataError(f"labelled={labelled} rows cannot be drawn from {rows} rows: request fewer, and at least 2")
    return {
        name: _drawn(parts[name], {name: size}, seed, _stratify_by(parts[name], by))[name]
        for name, size in sizes.items()
    }


def _drawn(rows: Dataset, sizes: dict[str, int], seed: int, by: str | None) -> dict[str, Dataset]:
    drawn = stratified_rows(_labels(rows, by), sizes, seed)
    return {name: rows.select(drawn[name]) for name in sizes}


def _labels(rows: Dataset, by: str | None) -> np.ndarray:
    return np.zeros(len(rows)) if by is None else np.asarray(values_of(rows, by))


def _warn_absent(whole: Dataset, parts: dict[str, Dataset], by: str | None) -> None:
    if by is None:
        return
    names = getattr(whole.features[by], "names", None)
    absent = absent_classes(_labels(whole, by), {name: _labels(part, by) for name, part in parts.items()}, names)
    if absent:
        logger.warning(absent)


def _stratify_by(train: Dataset, label: str | None) -> str | None:
    if label is None or label not in train.column_names:
        return None
    feature = train.features[label]
    number = isinstance(feature, Value) and "float" in feature.dtype
    discrete = isinstance(feature, ClassLabel | Value) and not number
    return label if discrete and None not in values_of(train, label) else None
