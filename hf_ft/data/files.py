"""Read all splits of a data source. ``datasets`` reads files, never scripts."""

from __future__ import annotations

from pathlib import Path

from datasets import DatasetDict, load_dataset, load_from_disk

from hf_ft.data.columns import IMAGE_SUFFIXES, is_text, some_text
from hf_ft.errors import DataError
from hf_ft.zoo.datasets import DATASETS

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_files(source: str, config_name: str | None = None, train_split: str = "train") -> DatasetDict:
    """Read all splits of a source; data without splits become ``train_split``.

    Raises:
        DataError: if it cannot be read.
    """
    path = Path(source).expanduser()
    try:
        if source in DATASETS:
            return DatasetDict({train_split: DATASETS[source]()})
        if path.is_dir():
            return _read_folder(path, config_name, train_split)
        if path.is_file():
            options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
            reader = READERS[path.suffix.lower()]
            data = load_dataset(reader, data_files={train_split: str(path)}, **options)
            return _absolute_image_paths(data, path.parent)
        if source.startswith((".", "/", "~")):
            raise FileNotFoundError("no such file or folder")
        return load_dataset(source, name=config_name)
    except ImportError:
        raise  # a short name's package is missing: the message says how to install it
    except Exception as error:  # `datasets` raises many types, some with no hint of what was asked for
        raise DataError(
            f"cannot read the data {source!r} ({type(error).__name__}: {error}); expected one of "
            f"{', '.join(DATASETS)}, a folder of images, a file or folder of {', '.join(READERS)}, a folder written by "
            "save_to_disk, or a Hub id (with config_name if it has several)",
            arguments=("config_name",),
        ) from error


def _read_folder(path: Path, config_name: str | None, train_split: str) -> DatasetDict:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        data = load_from_disk(str(path))
        return data if isinstance(data, DatasetDict) else DatasetDict({train_split: data})
    if (patterns := _image_patterns(path, train_split)) is None:
        return _absolute_image_paths(load_dataset(str(path), name=config_name), path)
    return load_dataset("imagefolder", data_dir=str(path), data_files=patterns, drop_labels=False, drop_metadata=True)


def _image_patterns(folder: Path, train_split: str) -> dict[str, str] | None:
    # Explicit, because `datasets` infers splits from any part of the path: a file called test_1.png in a class
    # folder, or a class called "train" next to "bus", would end up in another split.
    def holds_classes(parent: Path) -> bool:
        classes = (child for child in parent.iterdir() if child.is_dir())
        return any(file.suffix.lower() in IMAGE_SUFFIXES for child in classes for file in child.iterdir())

    if any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*")):
        return None
    splits = [child.name for child in sorted(folder.iterdir()) if child.is_dir() and holds_classes(child)]
    if train_split in splits:
        return {name: f"{name}/**" for name in splits}
    return {train_split: "**"} if holds_classes(folder) else None


def _absolute_image_paths(data: DatasetDict, folder: Path) -> DatasetDict:
    """Resolve the image paths of a table relative to the table, not to the working directory."""

    def absolute(values: list[str | None], column: str) -> dict[str, list[str | None]]:
        return {column: [value if value is None else str(folder / value) for value in values]}

    first = next(iter(data.values()))
    for column in [name for name in first.column_names if is_text(first, name)]:
        values = [value for value in some_text(first, column) if value.lower().endswith(IMAGE_SUFFIXES)]
        if any((folder / value).is_file() for value in values):
            data = data.map(absolute, batched=True, input_columns=column, fn_kwargs={"column": column})
    return data
