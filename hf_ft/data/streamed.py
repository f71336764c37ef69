"""Data sets whose training rows are streamed: read as they come, without a copy on disk.

The other splits are read as a whole, since they are evaluated again and again.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from transformers.utils import logging

from hf_ft.data.class_names import plain
from hf_ft.data.columns import LOOKED_AT, Columns, find_columns, usual_label, values_of
from hf_ft.data.files import is_saved, read_error
from hf_ft.data.image_folders import holds_metadata, read_image_folder
from hf_ft.data.load import load_splits, split_names
from hf_ft.data.media import MEDIA
from hf_ft.data.split_names import Role
from hf_ft.data.table_files import READERS, is_table
from hf_ft.data.tables import TABLES, table_options
from hf_ft.data.unknown_classes import check_known, hides_labels, is_missing
from hf_ft.errors import DataError
from hf_ft.zoo.datasets import DATASETS

logger = logging.get_logger(__name__)
SHARDS = 16  # parts of a data set that is already on disk, for processes and workers


@dataclass(frozen=True)
class Streamed:
    """A stream of training rows, and the other splits.

    Attributes:
        train: rows of the input columns and ``labels``, encoded; files are not opened yet.
        splits: ``validation`` and, if available, ``test``, as :func:`~hf_ft.data.load_splits` reads them.
        columns: columns and classes of the splits.
    """

    train: IterableDataset
    splits: DatasetDict
    columns: Columns

    @property
    def train_columns(self) -> Columns:
        """The columns of the stream, whose labels are numbers already."""
        return replace(self.columns, label="labels", index=None, multi_hot=True)


def load_streamed(
    source: str,
    *,
    config_name: str | None = None,
    names: Mapping[Role, str | None],
    encoding: str | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
    **splitting: Any,
) -> Streamed:
    """Open a data set for streaming.

    Args:
        source: as in :func:`~hf_ft.data.load_splits`. What is on disk as single files or Arrow files is read there
            without a copy; tables and data from the Hub are streamed.
        names: split names by role; None for the usual ones.
        splitting: how rows are held out for validation, if the training rows are known before they are read.

    Raises:
        DataError: if the source cannot be read, has no validation split, or its columns do not fit.
    """
    found = {"image_column": image_column, "text_column": text_column, "label_column": label_column}
    found["audio_column"] = audio_column
    if _on_disk(source):
        splits = load_splits(
            source,
            config_name=config_name,
            train_split=names["train"] or "train",
            validation_split=names["validation"],
            test_split=names["test"],
            label_column=label_column,
            encoding=encoding,
            **splitting,
        )
        columns = find_columns(splits, **found)
        rows = splits.pop("train")
        train = _undecoded(rows.to_iterable_dataset(num_shards=min(SHARDS, len(rows))))
        return Streamed(_encoded(train, columns), splits, columns)
    parts = _open(source, config_name, names, encoding)
    if "validation" not in parts:
        raise DataError(
            f"{source!r} has no validation split, and no rows can be held out of a stream: set validation_split, or "
            "read the data without streaming",
            arguments=("validation_split",),
        )
    train = _undecoded(parts.pop("train"))
    splits = DatasetDict({name: _kept(_undecoded(part)) for name, part in parts.items()})
    columns = _columns(train, splits, found)
    return Streamed(_encoded(train, columns), splits, columns)


def _on_disk(source: str) -> bool:
    """Whether reading it makes no copy of its rows: only names of files are read, or arrow files mapped."""
    path = Path(source).expanduser()
    if source in DATASETS or is_saved(path):
        return True
    if not path.is_dir() or holds_metadata(path):
        return False
    tables = [file for file in path.iterdir() if is_table(file)]
    return not tables and any(read_image_folder(path, "train", tables, media) is not None for media in MEDIA)


def _open(
    source: str, config_name: str | None, names: Mapping[Role, str | None], encoding: str | None
) -> dict[str, IterableDataset]:
    path = Path(source).expanduser()
    options: dict[str, Any] = {}
    where: dict[str, Any] = {"name": config_name}
    kind = str(path) if path.exists() else source
    if path.is_file():
        kind, where = READERS[path.suffix.lower()], {"data_files": {names["train"] or "train": str(path)}}
    first = next((file for file in sorted(path.rglob("*")) if is_table(file)), path) if path.is_dir() else path
    if first.suffix.lower() in TABLES and path.exists():
        options = table_options(first, encoding)
        options.pop("features", None)  # those of one file
    try:
        found = load_dataset(kind, streaming=True, **where, **options)
    except Exception as error:  # as in read_files
        raise read_error(source, error) from error
    return {role: found[name] for role, name in split_names(source, list(found), names).items()}


def _undecoded(rows: IterableDataset) -> IterableDataset:
    """The rows with files unopened, and known types."""
    features = rows.features or Dataset.from_list(list(rows.take(LOOKED_AT))).features
    rows = rows if rows.features else rows.cast(features)
    for name, feature in features.items():
        for media in MEDIA:
            rows = rows.cast_column(name, media.unopened) if media.is_type(feature) else rows
    return rows


def _kept(rows: IterableDataset) -> Dataset:
    """All rows, in a temporary file."""
    return Dataset.from_generator(_rows, features=rows.features, gen_kwargs={"rows": rows}, cache_dir=_folder())


def _rows(rows: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from rows


@functools.cache
def _folder() -> str:
    folder = tempfile.TemporaryDirectory(prefix="hf_ft_rows_")
    atexit.register(folder.cleanup)
    return folder.name


def _columns(train: IterableDataset, splits: DatasetDict, given: Mapping[str, str | None]) -> Columns:
    """The columns, and the classes of all training rows."""
    some = Dataset.from_list(list(train.take(LOOKED_AT)), features=train.features)
    label = given["label_column"] or usual_label(some)
    columns = find_columns(DatasetDict({"train": some}), **given)
    if columns.index is None:
        return find_columns(DatasetDict({"train": some, **splits}), **given)
    logger.warning(
        f"column {label!r} has no class names, so all of it is read once to find the classes. Give it the type "
        "ClassLabel to avoid that."
    )
    values = [row[columns.label] for row in train.select_columns([columns.label])]
    values = list(_flat(values)) if columns.problem_type == "multi_label_classification" else values
    hidden = hides_labels(train.features[columns.label], values)
    values = list({value for value in values if not is_missing(value, hidden)})
    for name, split in splits.items():
        check_known(name, list(_flat(values_of(split, columns.label))), values, hidden or name == "test")
    spelled = {value: plain(value) if isinstance(value, str) else value for value in values}
    ordered = sorted(set(spelled.values()))
    index = {value: ordered.index(name) for value, name in spelled.items()}
    return replace(columns, names=tuple(map(str, ordered)), index=index)


def _flat(values: Collection[Any]) -> Iterator[Any]:
    return itertools.chain.from_iterable(value if isinstance(value, list) else [value] for value in values)


def _encoded(train: IterableDataset, columns: Columns) -> IterableDataset:
    """The input columns, and labels as numbers."""
    names = [name for name in (*columns.inputs, columns.label) if name]
    encode = functools.partial(_with_numbers, columns=columns)
    drop = [columns.label] if columns.label != "labels" else []
    return train.select_columns(names).map(encode, remove_columns=drop)


def _with_numbers(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    value = row[columns.label]
    if value is None:
        raise DataError(f"a training row has no {columns.label!r}: drop it, or set label_column")
    return {"labels": columns.encode([value])[0]}


class RowCollator:
    """Collates rows of a stream after a transform, which opens and augments; and rows of other splits as they are.

    Args:
        inputs: a column that only rows of the stream have.
        transform: turns columns of rows into columns of inputs.
        plain: the same without augmentation, for rows that are marked (see :func:`unaugmented`).
        collate: turns rows of inputs into a batch.
    """

    def __init__(
        self,
        inputs: str,
        transform: Callable[[dict[str, Any]], Any],
        plain: Callable[[dict[str, Any]], Any],
        collate: Callable[[list[Any]], Any],
    ) -> None:
        self.inputs, self.transform, self.plain, self.collate = inputs, transform, plain, collate

    def __call__(self, rows: list[Any]) -> Any:
        if self.inputs not in rows[0]:
            return self.collate(rows)
        marked = PLAIN in rows[0]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != PLAIN}
        ready = dict((self.plain if marked else self.transform)(columns))
        return self.collate([dict(zip(ready, values, strict=True)) for values in zip(*ready.values(), strict=True)])


PLAIN = "__plain__"


def unaugmented(rows: IterableDataset) -> IterableDataset:
    """The rows, marked for :class:`RowCollator` not to be augmented."""
    return rows.map(_marked)


def _marked(row: dict[str, Any]) -> dict[str, Any]:
    return {PLAIN: True}
