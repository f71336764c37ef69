"""Samples for a trained model: files, folders of files, tables and data sets, with labels or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from hf_ft.data.class_names import plain, with_plain_labels
from hf_ft.data.columns import Columns, ProblemType, find_inputs, shown_columns, usual_label
from hf_ft.data.files import DATA_SUFFIXES, is_saved
from hf_ft.data.image_folders import files, holds_metadata
from hf_ft.data.labels_by_name import labels_by_name
from hf_ft.data.load import load_split
from hf_ft.data.media import MEDIA, Media
from hf_ft.data.table_files import is_table
from hf_ft.errors import DataError
from hf_ft.models.tasks import Task

FOLDER_LABEL = "label"


@dataclass(frozen=True)
class Wanted:
    """What a trained model can predict: the kind of its data and of its predictions, and its class names in order."""

    task: Task
    problem_type: ProblemType
    names: tuple[str, ...]

    @property
    def media(self) -> Media | None:
        """The kind of its files; None for texts."""
        return next((media for media in MEDIA if media.task == self.task), None)


@dataclass(frozen=True)
class Reading:
    """How to read the samples of a source; the fields are arguments of :func:`read_inputs`.

    Attributes:
        split: the split, if a source has several (default: the only one, or else the test or validation split).
        config_name: configuration of a Hub data set.
        encoding: encoding of csv and tsv files.
        label_column: by default found by name and type.
    """

    split: str | None = None
    config_name: str | None = None
    encoding: str | None = None
    image_column: str | None = None
    audio_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Inputs:
    """Samples to predict.

    Attributes:
        rows: their columns; files are not opened yet.
        columns: the input columns; no label.
        labels: as from :func:`labels_by_name`; None if there are none.
        why_not: why labels that seem to be present cannot be used.
    """

    rows: Dataset
    columns: Columns
    labels: list[Any] | None = None
    why_not: str = ""


def read_inputs(
    sources: Sequence[str | Path] | Dataset, wanted: Wanted, reading: Reading | None = None, labelled: bool = False
) -> Inputs:
    """Read samples, and their labels if there are any.

    Args:
        sources: files of images or sounds, and folders of them, which are searched recursively; or one table, data set
            on the Hub, or folder written by ``save_to_disk``; or a data set. In a folder of files, a folder with the
            name of a class labels what is in it.
        labelled: whether labels are required; folders are then read as :func:`~hf_ft.data.load_splits` reads them.

    Raises:
        DataError: if there is nothing to read, it is of another kind than the model's data, or labels are required and
            missing, or do not fit the model's classes.
    """
    reading = reading or Reading()
    rows = sources if isinstance(sources, Dataset) else _rows([str(one) for one in sources], wanted, reading, labelled)
    task, names = find_inputs(rows, reading.image_column, reading.text_column, reading.audio_column)
    if task != wanted.task:
        raise DataError(
            f"column {names[0]!r} is read as {task}, but the model classifies {wanted.task} data: set "
            "image_column, audio_column or text_column, or use another model",
            arguments=("image_column", "audio_column", "text_column"),
        )
    if not len(rows):
        raise DataError("there are no rows: use other data.")
    labels, why_not = _labels(rows, wanted, reading, labelled)
    rows = rows.with_format(None).select_columns(list(names))
    if wanted.media is not None:
        rows = rows.cast_column(names[0], wanted.media.unopened)
    return Inputs(rows, Columns(task, names, "", wanted.problem_type, wanted.names), labels, why_not)


def _rows(sources: list[str], wanted: Wanted, reading: Reading, labelled: bool) -> Dataset:
    paths = [Path(source).expanduser() for source in sources]
    if wanted.media is not None and all(map(_is_files, paths)) and not (labelled or reading.split):
        return _listed(paths, wanted.media, wanted.names)
    if len(sources) != 1:
        if absent := [str(path) for path in paths if not path.exists()]:
            raise DataError(f"there is no file or folder {absent[0]!r}: correct the name, or leave it out.")
        which = next((str(path) for path in paths if not _is_files(path)), sources[0])
        raise DataError(f"{which!r} is one of {len(sources)} sources, but only files can be combined: give it alone.")
    given = {"config_name": reading.config_name, "encoding": reading.encoding}
    return load_split(sources[0], reading.split, **given)


def _is_files(path: Path) -> bool:
    """Whether it is a file, or a folder that may hold files, as opposed to tables and data sets."""
    if path.is_dir():
        if is_saved(path) or holds_metadata(path):
            return False
        return {_kind(file) for file in files(path)} - {""} != {"data"}
    return path.is_file() and not is_table(path)


def _kind(file: str) -> str:
    """Whether a file holds an image or a sound, or rows."""
    if any(media.holds(file) for media in MEDIA):
        return "media"
    return "data" if file.lower().endswith(DATA_SUFFIXES) else ""


def _listed(paths: Sequence[Path], media: Media, names: Sequence[str]) -> Dataset:
    """The files, and the class of each if all are in folders of classes."""
    known = {plain(name) for name in names}
    found: list[str] = []
    labels: list[str | None] = []
    for path in paths:
        inside = sorted(filter(media.holds, files(path))) if path.is_dir() else [str(path)]
        if not inside:
            raise DataError(f"there are no {media.name}s in {str(path)!r}, nor in its subfolders: use another folder.")
        found += inside
        labels += [_class_of(Path(file).relative_to(path), known) if path.is_dir() else None for file in inside]
    columns: dict[str, list[Any]] = {media.task: found}
    if None not in labels:
        columns[FOLDER_LABEL] = labels
    return Dataset.from_dict(columns, features=Features({name: Value("string") for name in columns})).cast_column(
        media.task, media.unopened
    )


def _class_of(file: Path, known: set[str]) -> str | None:
    """The first of the folders that a file is in that is a class."""
    return next((name for name in map(plain, file.parts[:-1]) if name in known), None)


def _labels(rows: Dataset, wanted: Wanted, reading: Reading, required: bool) -> tuple[list[Any] | None, str]:
    column = reading.label_column or usual_label(rows)
    if column is None:
        if required:
            raise DataError(
                f"no label column among {shown_columns(rows)}: set label_column, or a folder for each class",
                arguments=("label_column",),
            )
        return None, ""
    try:
        labels = labels_by_name(with_plain_labels(rows, column), column, wanted.names, wanted.problem_type)
    except DataError as error:
        if required or reading.label_column:
            raise
        return None, str(error)
    missing = sum(label is None for label in labels)
    if required and missing:
        raise DataError(
            f"{missing:,} of {len(labels):,} rows have no {column!r}: leave them out, or set label_column or split",
            arguments=("label_column", "split"),
        )
    return (None, "") if missing == len(labels) else (labels, "")
