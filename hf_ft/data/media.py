"""The kinds of files that a sample may be: images and sounds."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import PIL.Image
from datasets import Audio, Image

# What Pillow reads besides images: documents, vector graphics, video, and measurements.
NO_IMAGES = {".bufr", ".emf", ".eps", ".fit", ".fits", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".pdf", ".ps", ".wmf"}
SOUND_SUFFIXES = (".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav")


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """The suffixes of the image files that Pillow reads here, with its plugins."""
    PIL.Image.init()
    known = {suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
    return tuple(sorted(known - NO_IMAGES))


@dataclass(frozen=True)
class Media:
    """A kind of file.

    Attributes:
        task: the task of the classifiers that take such files, and the name of their column in a folder.
        name: one of them, for messages.
        suffixes: gives the suffixes of the files that are read.
        feature: the type of a column in a folder.
        unopened: the type of a column of files that are opened later, so that an error can name the row.
        columns: the usual names of such a column.
    """

    task: Literal["image", "audio"]
    name: str
    suffixes: Callable[[], tuple[str, ...]]
    feature: Any
    unopened: Any
    columns: tuple[str, ...]

    def holds(self, file: str) -> bool:
        """Whether a file is of this kind and can be read, by its suffix."""
        return os.path.splitext(file)[1].lower() in self.suffixes()

    def is_type(self, feature: Any) -> bool:
        """Whether a column of this type holds such files."""
        return isinstance(feature, type(self.feature))


_PATHS = ("file_name", "filename", "file", "path")
IMAGES = Media("image", "image", image_suffixes, Image(), Image(decode=False), ("image", "img", "image_path", *_PATHS))
# Never opened here: `datasets` opens sounds with torchcodec, which needs an installed FFmpeg.
SOUNDS = Media(
    "audio",
    "sound",
    lambda: SOUND_SUFFIXES,
    Audio(decode=False),
    Audio(decode=False),
    ("audio", "sound", "speech", "audio_path", *_PATHS),
)
MEDIA = (IMAGES, SOUNDS)
