"""Read all splits of a data source. ``datasets`` reads files, never scripts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from datasets import DatasetDict, load_dataset, load_from_disk
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_ft.data.image_folders import files, holds_metadata, read_image_folder
from hf_ft.data.media import MEDIA
from hf_ft.data.table_files import READERS, is_table, read_table, read_table_folder
from hf_ft.data.tables import TABLES, table_options
from hf_ft.errors import DataError
from hf_ft.zoo.datasets import DATASETS

SCANNED = 20_000  # files that are inspected before a folder is searched
FEW = 1_000  # files that are searched in any case
LEAST_SHARE = 0.3  # of images, sounds and tables among the files of a data set
ARCHIVES = (".arrow", ".tar", ".zip")  # those that only `datasets` itself recognises
DATA_SUFFIXES = (*READERS, *ARCHIVES)


def read_files(
    source: str, config_name: str | None = None, train_split: str = "train", encoding: str | None = None
) -> DatasetDict:
    """Read all splits of a source; data without splits become ``train_split``.

    Raises:
        DataError: if it cannot be read.
    """
    path = Path(source).expanduser()
    _check_config_name(config_name, source, path)
    try:
        if path.is_dir():
            return _read_folder(path, config_name, train_split, encoding)
        _check_encoding(encoding, source, [path])
        if source in DATASETS:
            return DatasetDict({train_split: DATASETS[source]()})
        if path.is_file():
            return DatasetDict({train_split: read_table(path, encoding)})
        if not _may_be_on_the_hub(source):
            raise FileNotFoundError("no such file or folder")
        return load_dataset(source, name=config_name)
    except (DataError, ImportError):
        raise  # a short name's package is missing: the message says how to install it
    except Exception as error:  # `datasets` raises many types, some without any hint of what was requested
        raise read_error(source, error) from error


def _may_be_on_the_hub(source: str) -> bool:
    """Whether a name is spelled like the id or the address of a repository, not like a path."""
    if "://" in source:
        return True
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def read_error(source: str, error: Exception) -> DataError:
    """The error to raise in place of one from ``datasets``."""
    cause = _cause(error)
    absent = "" if Path(source).expanduser().exists() else ", which is not a local file or folder"
    return DataError(
        f"cannot read the data {source!r}{absent} ({type(cause).__name__}: {cause}); expected one of "
        f"{', '.join(DATASETS)}, a folder of images or sounds, a file or folder of {', '.join(READERS)}, a folder "
        "written by save_to_disk, or a Hub id (with config_name if it has several)",
        arguments=("config_name",),
    )


def _cause(error: BaseException) -> BaseException:
    """What is wrong with a file, which `datasets` wraps in "An error occurred while generating the dataset"."""
    return error.__cause__ if "generating the dataset" in str(error) and error.__cause__ else error


def _check_config_name(config_name: str | None, source: str, path: Path) -> None:
    """Reject a configuration if there can be none."""
    if config_name is not None and (source in DATASETS or path.is_file() or is_saved(path)):
        raise DataError(
            f"config_name={config_name!r} has no effect, since {source!r} has no configurations: leave it out.",
            arguments=("config_name",),
        )


def is_saved(path: Path) -> bool:
    """Whether it is a folder written by ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def is_encoded(source: str) -> bool:
    """Whether it is a csv or tsv file, or a folder with such files: what ``encoding`` applies to."""
    path = Path(source).expanduser()
    found = files(path) if path.is_dir() and not is_saved(path) else [path]
    return any(Path(file).suffix.lower() in TABLES for file in found)


def _check_encoding(encoding: str | None, source: str, tables: Iterable[Path]) -> None:
    """Reject an encoding if there is nothing to decode."""
    if encoding is not None and not any(file.suffix.lower() in TABLES for file in tables):
        raise DataError(
            f"encoding={encoding!r} has no effect, since {source!r} is not a csv or tsv file: leave it out.",
            arguments=("encoding",),
        )


def _read_folder(path: Path, config_name: str | None, train_split: str, encoding: str | None) -> DatasetDict:
    if is_saved(path):
        _check_encoding(encoding, str(path), ())
        data = load_from_disk(str(path))
        return data if isinstance(data, DatasetDict) else DatasetDict({train_split: data})
    _check_is_data(path)
    found = None
    for media in () if holds_metadata(path) else MEDIA:
        found = read_image_folder(path, train_split, [file for file in path.iterdir() if is_table(file)], media)
        if found is not None:
            break
    tables = [] if found is not None else _tables(path)
    _check_encoding(encoding, str(path), tables)
    if found is None:
        if tables and config_name is None and not holds_metadata(path) and not _is_described(path):
            return read_table_folder(path, tables, train_split, encoding)
        all_csv = all(file.suffix.lower() in TABLES for file in tables) and not holds_metadata(path)
        options = table_options(tables[0], encoding) if tables and all_csv else {}
        options.pop("features", None)  # those of one file
        return load_dataset(str(path), name=config_name, **options)
    if config_name is not None:
        raise DataError(
            f"config_name={config_name!r} has no effect on a folder of images or sounds: leave it out.",
            arguments=("config_name",),
        )
    return found


def _tables(folder: Path) -> list[Path]:
    """The tables of a folder in order, without hidden ones."""
    found = (Path(file) for file in files(folder) if is_table(file))
    return sorted(file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts))


def _is_described(folder: Path) -> bool:
    """Whether a data card says which files belong to which split, or archives hold the data."""
    card = folder / "README.md"
    _, _, front = (card.read_text(errors="replace") if card.is_file() else "").partition("---")
    described = re.search(r"^(configs|dataset_info):", front.partition("\n---")[0], re.MULTILINE)
    return bool(described) or any(file.suffix.lower() in ARCHIVES for file in folder.iterdir())


def _check_is_data(folder: Path) -> None:
    """Reject a folder such as the home folder: searching all of it would take minutes."""
    seen = list(islice(files(folder), SCANNED))
    known = sum(any(m.holds(file) for m in MEDIA) or file.lower().endswith(DATA_SUFFIXES) for file in seen)
    if len(seen) > FEW and known < LEAST_SHARE * len(seen):
        raise DataError(
            f"{str(folder)!r} is not a data folder: of the first {len(seen):,} files in it and its subfolders, "
            f"only {known:,} are images, sounds or tables. Give the folder of the data set itself."
        )
