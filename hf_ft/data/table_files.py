"""Files of rows: a single one, or a folder of them, in which the names of files and folders indicate the splits.

``datasets`` knows only some names of splits and puts the rows of all other files, such as ``Testing.csv``, into
training; it reads all files with the options of one, and refuses a test file whose columns differ from the training
file's.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset
from transformers.utils import logging

from hf_ft.data.columns import is_text, some_text
from hf_ft.data.media import MEDIA
from hf_ft.data.split_names import Role, role_of
from hf_ft.data.tables import TABLES, table_options
from hf_ft.errors import DataError

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SHOWN = 5  # names in a message
logger = logging.get_logger(__name__)


def is_table(file: str | Path) -> bool:
    """Whether a file holds rows that can be read, by its suffix."""
    return os.path.splitext(file)[1].lower() in READERS


def read_table(file: Path, encoding: str | None = None) -> Dataset:
    """The rows of a file (see :func:`read_tables`)."""
    rows = read_tables([file], file.parent, encoding)
    _warn_of_split_column(rows)
    return rows


def read_tables(files: Iterable[Path], folder: Path, encoding: str | None = None) -> Dataset:
    """The rows of these files, with the columns of the first.

    Args:
        folder: a further folder that image paths may be relative to, besides that of the file itself.
        encoding: encoding of csv and tsv files.

    Raises:
        DataError: if a file cannot be read as intended; the message names the place.
    """
    groups: dict[tuple[str, Path, str], list[Path]] = defaultdict(list)
    for file in files:
        reader, options = _how(file, encoding)
        groups[reader, file.parent, json.dumps(options)].append(file)
    if len({reader for reader, *_ in groups}) > 1:
        some = ", ".join(str(group[0]) for group in groups.values())
        raise DataError(f"tables of different formats would become one split: {some}. Keep those of one format")
    parts = []
    for (reader, parent, described), group in groups.items():
        names = [glob.escape(str(file)) for file in group]  # `datasets` treats them as patterns
        part = load_dataset(reader, data_files=names, split="train", **_with_features(json.loads(described)))
        parts.append(_absolute_image_paths(part, (parent, folder)))
    return concatenate_datasets([parts[0], *(_aligned(part, parts[0]) for part in parts[1:])])


def read_table_folder(
    folder: Path, files: Iterable[Path], train_split: str, encoding: str | None = None
) -> DatasetDict:
    """All splits of a folder of tables; without names of splits, all rows become ``train_split``.

    Other splits get the columns of the training split, and their types where the values allow it.

    Raises:
        DataError: if a table cannot be read, or if its name fits several splits.
    """
    splits: dict[str | None, list[Path]] = defaultdict(list)
    for file in files:
        splits[_role(file.relative_to(folder))].append(file)
    if set(splits) == {None}:
        rows = read_tables(splits[None], folder, encoding)
        _warn_of_split_column(rows)
        return DatasetDict({train_split: rows})
    if None in splits and "train" not in splits:
        raise DataError(
            f"no table of {str(folder)!r} is the training split by its name: if {str(splits[None][0])!r} is, rename it "
            "so that its name contains the word 'train'"
        )
    if left_out := [str(file) for file in splits.pop(None, ())]:
        more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        logger.warning(f"left out: {', '.join(left_out[:SHOWN])}{more}: no split has such a name.")
    read = {str(name): read_tables(splits[name], folder, encoding) for name in sorted(splits, key=str)}
    first = read.get("train", next(iter(read.values())))
    return DatasetDict({name: part if part is first else _aligned(part, first) for name, part in read.items()})


def _warn_of_split_column(rows: Dataset) -> None:
    """Warn about a column that names splits if nothing else does: test rows would be trained on."""
    for column in [name for name in rows.column_names if is_text(rows, name)]:
        values = some_text(rows, column)
        if values and all(map(role_of, values)):
            logger.warning(
                f"column {column!r} names splits, such as {values[0]!r}, but is not used: all rows are used for "
                "training, unless each split has its own file, such as train.csv and test.csv."
            )


def _how(file: Path, encoding: str | None) -> tuple[str, Mapping[str, Any]]:
    """The reader of a file, and its options."""
    suffix = file.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"files that end in {suffix!r} are not read: unpack or convert it")  # read_files names those
    if "::" in str(file):
        raise DataError(f"`datasets` interprets the '::' in {str(file)!r} as a chain of URLs: rename the file.")
    if not file.stat().st_size:
        raise DataError(f"{str(file)!r} is empty")
    if suffix in TABLES:
        return READERS[suffix], table_options(file, encoding)
    return READERS[suffix], _json_options(file) if suffix == ".json" else {}


def _with_features(options: dict[str, Any]) -> dict[str, Any]:
    types = options.get("features")
    return options | ({"features": Features({name: Value(kind) for name, kind in types.items()})} if types else {})


def _json_options(file: Path) -> dict[str, str]:
    """The key of the records, if a file is a single object with one list of records."""
    text = file.read_text("utf-8-sig", errors="replace").strip()
    if not text.startswith("{"):
        return {}
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return {}  # the reader names the place
    if text[end:]:
        return {}  # one object per line
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if len(lists) == 1:
        return {"field": lists[0]}
    raise DataError(
        f"{str(file)!r} is a single object with the keys {', '.join(map(repr, [*value][:SHOWN]))}, not a list of "
        "records. Write one record per line, and one file per split, such as train.jsonl and test.jsonl"
    )


def _role(file: Path) -> Role | None:
    """The split of a table: from the folder that it is in, its name, or a word in its name.

    Raises:
        DataError: if its name contains words of several splits.
    """
    for name in (*file.parts[:-1], file.stem):
        if role := role_of(name):
            return role
    roles = {role for word in re.split(r"[\W\d_]+", file.stem) if (role := role_of(word))}
    if len(roles) > 1:
        raise DataError(
            f"the table {str(file)!r} belongs to the splits {' and '.join(sorted(roles))} by its name: rename it"
        )
    return roles.pop() if roles else None


def _aligned(part: Dataset, first: Dataset) -> Dataset:
    """The columns of another part, with its types where the values allow it; a missing column is empty."""
    part = part.select_columns([name for name in first.column_names if name in part.column_names])
    for name, feature in first.features.items():
        if name not in part.column_names:
            part = part.add_column(name, [None] * len(part), feature=feature)
        elif part.features[name] != feature and not isinstance(part.features[name], ClassLabel):
            try:
                part = part.cast_column(name, feature)
            except (TypeError, ValueError, NotImplementedError):
                continue  # if it is the label column, find_columns refuses it
    return part


def _absolute_image_paths(rows: Dataset, folders: Sequence[Path]) -> Dataset:
    """Resolve the image paths of a table relative to the table, not to the working directory."""

    def absolute(values: list[str | None], column: str, folder: Path) -> dict[str, list[str | None]]:
        return {column: [value if value is None else _joined(folder, value) for value in values]}

    for column in [name for name in rows.column_names if is_text(rows, name)]:
        paths = [value for value in some_text(rows, column) if any(media.holds(value) for media in MEDIA)]
        for folder in folders:
            if any(os.path.isfile(_joined(folder, path)) for path in paths):
                keywords = {"column": column, "folder": folder}
                rows = rows.map(absolute, batched=True, input_columns=column, fn_kwargs=keywords)
                break
    return rows


def _joined(folder: Path, path: str) -> str:
    return os.path.join(folder, os.path.expanduser(path))
