"""Read all splits of a data source. ``datasets`` reads files, never scripts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk

from hf_ft.data.columns import image_suffixes, is_text, some_text
from hf_ft.data.image_folders import files, is_image, read_image_folder
from hf_ft.data.tables import TABLES, table_options
from hf_ft.errors import DataError
from hf_ft.zoo.datasets import DATASETS

SCANNED = 20_000  # files that are looked at before a folder is searched
FEW = 1_000  # files that are searched in any case
LEAST_SHARE = 0.3  # of images and tables among the files of a data set
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
DATA_SUFFIXES = (*READERS, ".arrow", ".tar", ".zip")  # also those that only `datasets` itself recognises


def read_files(
    source: str, config_name: str | None = None, train_split: str = "train", encoding: str | None = None
) -> DatasetDict:
    """Read all splits of a source; data without splits become ``train_split``.

    Raises:
        DataError: if it cannot be read.
    """
    path = Path(source).expanduser()
    _check_config_name(config_name, source, path)
    table = path if path.suffix.lower() in TABLES and path.is_file() else _first_table(path)
    if encoding is not None and table is None:
        raise DataError(
            f"encoding={encoding!r} has no effect, since {source!r} is no csv or tsv file: leave it out.",
            arguments=("encoding",),
        )
    try:
        if source in DATASETS:
            return DatasetDict({train_split: DATASETS[source]()})
        if "::" in source and path.exists() and not path.is_dir():
            raise DataError(f"`datasets` takes the '::' in {source!r} for a chain of URLs: rename the file.")
        if path.is_dir():
            return _read_folder(path, config_name, train_split, {} if table is None else table_options(table, encoding))
        if path.is_file():
            options = {} if table is None else table_options(table, encoding)
            reader = READERS[path.suffix.lower()]
            data = load_dataset(reader, data_files={train_split: str(path)}, **options)
            return _absolute_image_paths(data, path.parent)
        if source.startswith((".", "/", "~")):
            raise FileNotFoundError("no such file or folder")
        return load_dataset(source, name=config_name)
    except (DataError, ImportError):
        raise  # a short name's package is missing: the message says how to install it
    except Exception as error:  # `datasets` raises many types, some with no hint of what was asked for
        raise DataError(
            f"cannot read the data {source!r} ({type(error).__name__}: {error}); expected one of "
            f"{', '.join(DATASETS)}, a folder of images, a file or folder of {', '.join(READERS)}, a folder written by "
            "save_to_disk, or a Hub id (with config_name if it has several)",
            arguments=("config_name",),
        ) from error


def _check_config_name(config_name: str | None, source: str, path: Path) -> None:
    """Reject a configuration where there can be none."""
    if config_name is not None and (source in DATASETS or path.is_file() or _is_saved(path)):
        raise DataError(
            f"config_name={config_name!r} has no effect, since {source!r} has no configurations: leave it out.",
            arguments=("config_name",),
        )


def _is_saved(path: Path) -> bool:
    """Whether it is a folder written by ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _first_table(folder: Path) -> Path | None:
    """A table of a folder that holds no other data files."""
    if not folder.is_dir() or _is_saved(folder):
        return None
    data = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in DATA_SUFFIXES]
    return data[0] if data and all(file.suffix.lower() in TABLES for file in data) else None


def _read_folder(path: Path, config_name: str | None, train_split: str, options: dict[str, Any]) -> DatasetDict:
    if _is_saved(path):
        data = load_from_disk(str(path))
        return data if isinstance(data, DatasetDict) else DatasetDict({train_split: data})
    _check_is_data(path)
    images = read_image_folder(path, train_split)
    if images is None:
        return _absolute_image_paths(load_dataset(str(path), name=config_name, **options), path)
    if config_name is not None:
        raise DataError(
            f"config_name={config_name!r} has no effect on a folder of images: leave it out.",
            arguments=("config_name",),
        )
    return images


def _check_is_data(folder: Path) -> None:
    """Reject a folder such as the home folder: to look through all of it would take minutes."""
    seen = list(islice(files(folder), SCANNED))
    known = sum(is_image(file) or file.lower().endswith(DATA_SUFFIXES) for file in seen)
    if len(seen) > FEW and known < LEAST_SHARE * len(seen):
        raise DataError(
            f"{str(folder)!r} is no folder of data: of the first {len(seen):,} files in it and its subfolders, "
            f"{known:,} are images or tables. Name the folder of the data set itself."
        )


def _absolute_image_paths(data: DatasetDict, folder: Path) -> DatasetDict:
    """Resolve the image paths of a table relative to the table, not to the working directory."""

    def absolute(values: list[str | None], column: str) -> dict[str, list[str | None]]:
        return {column: [value if value is None else str(folder / value) for value in values]}

    first = next(iter(data.values()))
    for column in [name for name in first.column_names if is_text(first, name)]:
        values = [value for value in some_text(first, column) if value.lower().endswith(image_suffixes())]
        if any((folder / value).is_file() for value in values):
            data = data.map(absolute, batched=True, input_columns=column, fn_kwargs={"column": column})
    return data
