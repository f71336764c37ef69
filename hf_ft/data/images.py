"""Open images, and find unreadable ones."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
from datasets import Dataset, DatasetDict
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import get_worker_info
from transformers.utils import logging

from hf_ft.data.columns import ROW, Columns, values_of
from hf_ft.data.media import IMAGES, MEDIA, Media
from hf_ft.data.prints import Print, Prints, image_print, sound_print
from hf_ft.data.progress import bar
from hf_ft.data.sounds import open_whole, reason_of_sound
from hf_ft.errors import DataError
from hf_ft.splits import absent_classes

logger = logging.get_logger(__name__)
OnCorrupt = Literal["refuse", "skip"]
CHUNK = 256  # undecoded images held in memory at a time
LARGE = 100_000  # bytes from which an image is worth decoding at a reduced size, and in a thread
# A large JPEG is decoded at no less than this many times the required side: twice, as some processors resize to up to
# 1.25 times their size and then crop. Pixels resized from there differ by 0.3 of 255 levels on average, and by at most
# 6.
KEPT = 2.5
SHOWN = 3  # unreadable images named in a message


def open_rgb(value: Any, row: int, side: int | None = None) -> PIL.Image.Image:
    """Open an image as 8-bit RGB, rotated upright according to its EXIF orientation.

    Transparency is dropped, as in Transformers' pipelines. Of 16-bit values, the upper 8 bits are kept; Pillow itself,
    and hence a pipeline, would turn all values above 255 into white.

    Args:
        value: a path, or a dictionary of ``path`` and ``bytes``.
        row: row number in the source, for the error message.
        side: the side in pixels to which the image will be resized; a large JPEG is then decoded at a half, a quarter
            or an eighth of its size, and at least :data:`KEPT` times that side. None to decode it whole.

    Raises:
        DataError: if it cannot be read; the message names row and path.
    """
    try:
        return _opened(value, side)
    except Exception as error:  # a damaged file makes PIL raise almost anything
        reason = _reason_of(error)
        raise DataError(f"cannot read the image in row {row} ({_path(value) or 'no path'}): {reason}") from error


def open_batch(values: Sequence[Any], rows: Sequence[int], side: int | None = None) -> list[PIL.Image.Image]:
    """:func:`open_rgb` of several images, large ones in parallel: decoders release the GIL."""
    if len(values) < 2 or _file_size(values[0]) < LARGE or get_worker_info() is not None:
        return [open_rgb(value, row, side) for value, row in zip(values, rows, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(open_rgb, values, rows, itertools.repeat(side)))


def resized_side(processor: Any) -> int | None:
    """The longest side in pixels to which a processor resizes images; None if it may use them at full size."""
    sides = []
    for part in getattr(processor, "processors", [processor]):
        numbers = [number for number in dict(getattr(part, "size", None) or {}).values() if number]
        if not numbers or not getattr(part, "do_resize", False):
            return None
        sides.append(max(numbers) / (getattr(part, "crop_pct", None) or 1))
    return math.ceil(max(sides))


def _file_size(value: Any) -> int:
    """The size of an undecoded image in bytes; 0 if it is unknown."""
    if isinstance(value, dict) and value.get("bytes") is not None:
        return len(value["bytes"])
    path = _path(value)
    return os.path.getsize(path) if path is not None and os.path.isfile(path) else 0


def _opened(value: Any, side: int | None) -> PIL.Image.Image:
    if value is None:
        raise DataError("there is no image")
    value = {"path": value, "bytes": None} if isinstance(value, str) else value
    image = _reduced(value, side) if side is not None and _file_size(value) >= LARGE else None
    return _eight_bits(IMAGES.feature.decode_example(value) if image is None else image)


def _reduced(value: Mapping[str, Any], side: int) -> PIL.Image.Image | None:
    """A large JPEG, decoded at a reduced size and rotated upright; None for any other image."""
    with PIL.Image.open(value["path"] if value.get("bytes") is None else BytesIO(value["bytes"])) as image:
        wanted = math.ceil(KEPT * side)
        if not isinstance(image, JpegImageFile) or min(image.size) < 2 * wanted:
            return None
        image.draft(None, (wanted, wanted))
        image.load()
        return PIL.ImageOps.exif_transpose(image)


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    # Older versions of Pillow open a 16-bit PNG in mode "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        high_bytes = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return PIL.Image.fromarray(high_bytes).convert("RGB")
    if image.mode in ("I", "F"):
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if low < 0 or high > 255 or (image.mode == "F" and 0 < high <= 1):
            raise DataError(f"its 32-bit pixels range from {low:g} to {high:g}: convert them to 0-255, or to 16 bits")
    return image.convert("RGB")


def _path(value: Any) -> str | None:
    return value if isinstance(value, str) else value.get("path") if isinstance(value, dict) else None


@dataclass(frozen=True)
class Unreadable:
    """An image or a sound that cannot be opened.

    Attributes:
        row: row number in the source.
        path: path of the file; None if there is none.
        reason: why it cannot be opened.
    """

    row: int
    path: str | None
    reason: str

    def __str__(self) -> str:
        return f"row {self.row} ({self.path or 'no path'}): {self.reason}"


def check_images(
    splits: DatasetDict, columns: Columns, on_corrupt: OnCorrupt = "refuse", prints: Prints | None = None
) -> tuple[DatasetDict, dict[str, list[Unreadable]]]:
    """Open every image or sound once to find unreadable ones: truncated, empty, of another kind, or missing.

    Args:
        on_corrupt: ``"skip"`` removes them, with a warning.
        prints: takes the fingerprints of the others at the same time.

    Returns:
        The splits without them, and the files removed from each split; text is returned unchanged.

    Raises:
        DataError: for an unknown ``on_corrupt``; for unreadable files with ``"refuse"``; if a split becomes empty.
    """
    if on_corrupt not in ("refuse", "skip"):
        raise DataError(f"on_corrupt={on_corrupt!r} is unknown: choose refuse or skip")
    media = next((one for one in MEDIA if one.task == columns.task), None)
    if media is None:
        return splits, {name: [] for name in splits}
    kept, skipped = DatasetDict(), {}
    total = sum(len(split) for split in splits.values())
    with bar(f"opening {media.name}s", total, unit=f" {media.name}s") as shown:
        for name, split in splits.items():
            taken = None if prints is None else prints.splits.setdefault(name, [])
            kept[name], skipped[name] = _without_unreadable(split, columns.inputs[0], media, shown.update, taken)
    unreadable = [f"{name}, {file}" for name, files in skipped.items() for file in files]
    if not unreadable:
        return splits, skipped
    more = f"; and {len(unreadable) - SHOWN} more" if len(unreadable) > SHOWN else ""
    message = f"{len(unreadable)} of {total} {media.name}s cannot be read: {'; '.join(unreadable[:SHOWN])}{more}"
    if on_corrupt == "refuse":
        raise DataError(
            f"{message}. Repair or remove them, or skip them with on_corrupt='skip'.", arguments=("on_corrupt",)
        )
    if empty := [name for name, split in kept.items() if not len(split) and len(splits[name])]:
        raise DataError(f"{message}. Split {empty[0]!r} has no {media.name}s left.")
    logger.warning(" ".join([f"{message}. They are skipped.", *_lost_classes(splits, kept, columns)]))
    return kept, skipped


def _lost_classes(splits: DatasetDict, kept: DatasetDict, columns: Columns) -> list[str]:
    """Sentences about classes that lost their last file."""
    if columns.problem_type != "single_label_classification":
        return []
    names = None if columns.index else columns.names
    sentences = []
    for name, split in kept.items():
        if columns.label in split.column_names:
            before, after = (np.asarray(values_of(rows, columns.label)) for rows in (splits[name], split))
            sentences.append(absent_classes(before, {name: after}, names))
    return [sentence for sentence in sentences if sentence]


def _without_unreadable(
    split: Dataset, column: str, media: Media, advance: Callable[[int], Any], prints: list[Print] | None
) -> tuple[Dataset, list[Unreadable]]:
    rows = values_of(split, ROW) if ROW in split.column_names else list(range(len(split)))
    wrong, kept = [], []
    for place, (value, seen) in enumerate(_seen(split, column, media, prints is not None)):
        advance(1)
        if isinstance(seen, str):
            wrong.append(Unreadable(rows[place], _path(value), seen))
            continue
        kept.append(place)
        if prints is not None and seen is not None:
            prints.append(seen)
    return (split.select(kept) if wrong else split), wrong


def _seen(split: Dataset, column: str, media: Media, printed: bool) -> Iterator[tuple[Any, str | Print | None]]:
    """Yield each unopened file with the reason why it cannot be opened, or else its fingerprint or None."""
    undecoded = split.with_format(None).select_columns(column).cast_column(column, media.unopened)
    look = partial(_look_at_image if media is IMAGES else _look_at_sound, printed=printed)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding runs in parallel: decoders release the GIL
        for start in range(0, len(undecoded), CHUNK):
            values = undecoded[start : start + CHUNK][column]
            yield from zip(values, pool.map(look, values), strict=True)


def _look_at_image(value: Any, printed: bool) -> str | Print | None:
    try:
        # The whole file is read to decode it at an eighth of its size, which takes a third of the time.
        image = _opened(value, 1)
        return image_print(image) if printed else None
    except Exception as error:
        return _reason_of(error)


def _look_at_sound(value: Any, printed: bool) -> str | Print | None:
    try:
        samples = open_whole(value)
        return sound_print(samples) if printed else None
    except ImportError:
        raise
    except Exception as error:
        return reason_of_sound(error)


def _reason_of(error: Exception) -> str:
    """The reason without the path, which is reported separately, and without memory addresses."""
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image, or not in a format that Pillow supports"
    if isinstance(error, FileNotFoundError):
        beside = ", neither in the folder of the table nor in the working directory"
        return "no such file" + beside * (not os.path.isabs(error.filename or os.sep))
    return str(error) or type(error).__name__
