"""Folders with a subfolder of images, or of sounds, per class, or with such a folder per split.

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

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers.utils import logging

from hf_ft.data.class_names import plain
from hf_ft.data.media import IMAGES, Media
from hf_ft.data.progress import bar
from hf_ft.data.split_names import candidates, role_of
from hf_ft.errors import DataError

# Made by tools, so they are not classes, whatever images they contain.
TOOL_FOLDERS = {
    *("__MACOSX", "__pycache__", ".ipynb_checkpoints", ".cache", ".git", ".hg", ".svn", ".dvc"),
    *(".thumbnails", ".Trash", ".Trashes", "@eaDir"),
}
NOT_IMAGES = "._"  # prefix of files in which macOS keeps attributes of others, with the same suffix
UNTOLD = {"Thumbs.db", "desktop.ini"}  # made by file managers
WHOLE = "."  # as train_split: the folder itself
SHOWN = 5  # folders named in a message
logger = logging.get_logger(__name__)


def holds_metadata(folder: Path) -> bool:
    """Whether a table that `datasets` looks for describes the images."""
    return any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*"))


def read_image_folder(
    folder: Path, train_split: str, tables: Sequence[Path] = (), media: Media = IMAGES
) -> DatasetDict | None:
    """All splits of a folder of images or sounds, labelled by the first folder below the split; None if it is not one.

    Args:
        media: what to look for.
        tables: the tables in the folder itself: they hold the labels if the folders cannot be classes.

    Raises:
        DataError: if it is unclear which folders are splits, or which are classes.
    """
    folder = Path(os.path.abspath(folder))
    splits = _split_folders(folder, train_split, media)
    if not any(_holds_classes(child, media) for child in splits.values()):
        return None
    if train_split != WHOLE and (reason := _no_classes(folder, splits, media)):
        if tables:
            return None
        raise DataError(reason, arguments=("train_split",))
    with bar("listing files", unit=" files") as shown:
        listed = {name: sorted(_counted(files(child), shown)) for name, child in splits.items()}
    _tell_left_out(folder, splits, listed, media)
    found = {name: [file for file in listed[name] if _class_of(file, child, media)] for name, child in splits.items()}
    return _labelled(found, splits, media)


def _split_folders(folder: Path, train_split: str, media: Media) -> dict[str, Path]:
    """The folders of the splits by name: those with the names of splits, or else the folder itself."""
    if train_split == WHOLE:
        return {train_split: folder}
    holding = {child.name: child for child in _subfolders(folder) if _holds_classes(child, media)}
    if train_split in holding or candidates(holding, "train"):
        named = train_split in holding and train_split != "train"
        return {name: child for name, child in holding.items() if named or role_of(name)}
    _refuse_ambiguous(folder, holding, media)
    return {"train": folder}


def _refuse_ambiguous(folder: Path, holding: Mapping[str, Path], media: Media) -> None:
    """Refuse subfolders that look like splits, although none is the training split.

    Raises:
        DataError: naming them, and the arguments that settle it.
    """
    inside = {name: {sub.name for sub in _subfolders(child)} for name, child in holding.items()}
    named = [name for name in holding if role_of(name)]
    alike = [
        name for name in holding if any(len(inside[name] & inside[other]) > 1 for other in holding if other != name)
    ]
    if named or alike:
        names = sorted(set.union(*(inside[name] for name in named or alike)))
        shared = ", ".join(names[:SHOWN])
        if not named and all(map(role_of, names)):
            raise DataError(
                f"{str(folder)!r}: the splits ({shared}) are inside the classes ({', '.join(alike[:SHOWN])}). Move "
                f"the splits to the top, as in {names[0]}/{alike[0]}.",
                arguments=("train_split",),
            )
        raise DataError(
            f"{str(folder)!r}: the subfolders {', '.join((named or alike)[:SHOWN])} contain folders of "
            f"{media.name}s ({shared}). If they are splits, name them with validation_split, test_split and "
            f"train_split; if they are classes, set train_split to {WHOLE!r}.",
            arguments=("train_split", "validation_split", "test_split"),
        )


def _no_classes(folder: Path, splits: Mapping[str, Path], media: Media) -> str:
    """Why the folders of images or sounds cannot be classes, and what to do; empty if they can."""
    if folder not in splits.values():
        return ""
    holding = [child for child in _subfolders(folder) if any(map(media.holds, files(child)))]
    if all(role_of(child.name) for child in holding):
        names = ", ".join(child.name for child in holding)
        return (
            f"{str(folder)!r}: the subfolders {names} are splits by name, but contain {media.name}s outside class "
            f"folders. Add a folder for each class, or a table of {media.name} paths and labels; or set train_split to "
            f"{WHOLE!r} if these are the classes."
        )
    if len(holding) == 1:
        nested = _holds_classes(holding[0], media)
        deeper = f": the classes seem to be in {str(holding[0])!r}, so use this folder" * nested
        return (
            f"{str(folder)!r} has {media.name}s in only one subfolder{deeper}. A classifier needs a folder for each "
            f"class, or a table of {media.name} paths and labels."
        )
    return ""


def files(folder: Path) -> Iterator[str]:
    """The paths of all files in a folder and its subfolders, without those that tools made."""
    for parent, _, names in _walk(folder):
        yield from (os.path.join(parent, name) for name in _plain(names))


def _plain(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if not name.startswith(NOT_IMAGES))


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Like ``os.walk``, following links unless they lead back; the folders of tools are listed but not entered."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        yield parent, list(folders), names
        folders[:] = [name for name in folders if name not in TOOL_FOLDERS and not _leads_back(parent, name)]


def _leads_back(parent: str, name: str) -> bool:
    path = os.path.join(parent, name)
    return os.path.islink(path) and Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(path))


def _subfolders(folder: Path) -> list[Path]:
    return [child for child in sorted(folder.iterdir()) if child.is_dir() and child.name not in TOOL_FOLDERS]


def _holds_classes(folder: Path, media: Media) -> bool:
    """Whether subfolders contain images or sounds, at any depth."""
    return any(media.holds(file) for child in _subfolders(folder) for file in files(child))


def _counted(files: Iterable[str], shown: Any) -> Iterator[str]:
    for file in files:
        shown.update()
        yield file


def _class_of(file: str, split: Path, media: Media) -> str | None:
    """The first folder below the split that a file is in; None for files of other kinds, and outside the folders."""
    folder, *inside = os.path.relpath(file, split).split(os.sep)
    return plain(folder) if inside and media.holds(file) else None


def _labelled(found: Mapping[str, Sequence[str]], splits: Mapping[str, Path], media: Media) -> DatasetDict:
    """A data set per split; the classes are those of all splits."""
    classes = {name: [str(_class_of(file, splits[name], media)) for file in files] for name, files in found.items()}
    label = ClassLabel(names=sorted({name for names in classes.values() for name in names}))
    features = Features({media.task: Value("string"), "label": label})
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {media.task: list(files), "label": label.str2int(classes[name])}, features=features
            ).cast_column(media.task, media.feature)  # from_dict would encode sounds, which needs torchcodec
            for name, files in found.items()
        }
    )


def _tell_left_out(folder: Path, splits: Mapping[str, Path], listed: Mapping[str, Sequence[str]], media: Media) -> None:
    """Warn about what is not read: files outside the class folders, files of other kinds, other folders."""
    left_out: Counter[str] = Counter()
    for name, child in splits.items():
        for file in listed[name]:
            if _class_of(file, child, media) is None:
                suffix = os.path.splitext(file)[1].lower()
                beside = f"{media.name}s in {child}, outside class folders"
                what = beside if media.holds(file) else f"{suffix or 'other'} files"
                left_out[what] += os.path.basename(file) not in UNTOLD and not os.path.basename(file).startswith(".")
    if folder not in splits.values():
        for other in _subfolders(folder):
            if other not in splits.values():
                what = f"{media.name}s in {other}, which is not a split with class folders"
                left_out[what] += sum(map(media.holds, files(other)))
    for path, number in _made_by_tools(splits.values(), media).items():
        left_out[f"{media.name}s in {path}, which a tool made"] += number
    told = [f"{number:,} {what}" for what, number in sorted(left_out.items()) if number]
    if told:
        logger.warning(f"left out: {'; '.join(told)}.")


def _made_by_tools(folders: Iterable[Path], media: Media) -> Counter[str]:
    """The number of images or sounds in each folder of a tool."""
    found: Counter[str] = Counter()
    for folder in folders:
        for parent, children, _ in _walk(folder):
            for child in TOOL_FOLDERS.intersection(children):
                path = os.path.join(parent, child)
                found[path] += sum(map(media.holds, (file for _, _, names in os.walk(path) for file in _plain(names))))
    return found
