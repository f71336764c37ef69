"""Folders with a subfolder of images per class, or with such a folder per split.

``datasets`` would leave out folders that begin with ``__`` or a dot, cannot read names with ``::``, and infers splits
from any part of a path: a file called test_1.png in a class folder, or a class called "train" next to "bus", would end
up in another split.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers.utils import logging

from hf_ft.data.columns import IMAGE_SUFFIXES
from hf_ft.data.progress import bar

# Made by tools, so that they are no classes, whatever images they contain.
TOOL_FOLDERS = {
    *("__MACOSX", "__pycache__", ".ipynb_checkpoints", ".cache", ".git", ".hg", ".svn", ".dvc"),
    *(".thumbnails", ".Trash", ".Trashes", "@eaDir"),
}
NOT_IMAGES = "._"  # the beginning of files in which macOS keeps attributes of others, under the same suffix
logger = logging.get_logger(__name__)


def read_image_folder(folder: Path, train_split: str) -> DatasetDict | None:
    """All splits of a folder of images, labelled by the folder that each image is in; None if it is none.

    Without a split folder called ``train_split``, the folder itself is that split.
    """
    folder = Path(os.path.abspath(folder))
    if any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*")):
        return None
    splits = {child.name: child for child in _subfolders(folder) if _holds_classes(child)}
    if train_split not in splits:
        splits = {train_split: folder}
        if not _holds_classes(folder):
            return None
    with bar("listing files", unit=" files") as shown:
        images = {name: sorted(_counted(filter(is_image, files(child)), shown)) for name, child in splits.items()}
    _tell_left_out(splits.values())
    return _labelled(images)


def files(folder: Path) -> Iterator[str]:
    """The paths of all files in a folder and its subfolders, without those that tools made."""
    for parent, _, names in _walk(folder):
        yield from (os.path.join(parent, name) for name in names if not name.startswith(NOT_IMAGES))


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk``, through links unless they lead back; the folders of tools are listed, but not entered."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        yield parent, list(folders), names
        folders[:] = [name for name in folders if name not in TOOL_FOLDERS and not _leads_back(parent, name)]


def _leads_back(parent: str, name: str) -> bool:
    path = os.path.join(parent, name)
    return os.path.islink(path) and Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(path))


def _subfolders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and child.name not in TOOL_FOLDERS]


def _holds_classes(folder: Path) -> bool:
    """Whether a subfolder contains images."""
    return any(file.suffix.lower() in IMAGE_SUFFIXES for child in _subfolders(folder) for file in child.iterdir())


def _counted(files: Iterable[str], shown: Any) -> Iterator[str]:
    for file in files:
        shown.update()
        yield file


def is_image(file: str) -> bool:
    """Whether a file is an image, by its suffix."""
    return os.path.splitext(file)[1].lower() in ImageFolder.EXTENSIONS


def _labelled(images: Mapping[str, Sequence[str]]) -> DatasetDict:
    """A data set per split; the classes are those of all splits."""
    classes = {name: [os.path.basename(os.path.dirname(file)) for file in files] for name, files in images.items()}
    label = ClassLabel(names=sorted({name for names in classes.values() for name in names}))
    features = Features(image=Image(), label=label)
    return DatasetDict(
        {
            name: Dataset.from_dict({"image": list(files), "label": label.str2int(classes[name])}, features=features)
            for name, files in images.items()
        }
    )


def _tell_left_out(folders: Iterable[Path]) -> None:
    """Warn of the folders of tools that contain images."""
    left_out: Counter[str] = Counter()
    for folder in folders:
        for parent, children, _ in _walk(folder):
            for child in TOOL_FOLDERS.intersection(children):
                path = os.path.join(parent, child)
                left_out[path] += sum(map(is_image, (file for _, _, names in os.walk(path) for file in names)))
    for path, number in left_out.items():
        if number:
            logger.warning(f"{path} was made by a tool and is no class: its {number:,} images are left out.")
