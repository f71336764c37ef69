"""Fingerprints of samples: a hash to find equal ones, and a sketch to find nearly equal ones.

The sketch of an image has 16 x 16 pixels, that of a text 64 minima of hashes (MinHash); a sound has none. Nothing else
is kept of a sample, so the memory is below 1 KB per sample.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import PIL.Image

SIDE = 16  # pixels of a sketch: a digit of MNIST still differs from all others, and resized copies do not
HASHES = 64  # per text; the similarity of two texts is known to a standard error of 0.05
WORDS = 3  # length of a word sequence, which is compared as one
LEAST = 8  # word sequences that a text needs to be compared: shorter texts only count as the same if they are equal
_PRIME = 2**32 - 5
_FACTORS, _TERMS = np.random.default_rng(0).integers(1, 2**31, (2, HASHES, 1), dtype=np.uint64)
_NOT_WORDS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Print:
    """The fingerprint of a sample.

    Attributes:
        same: hash that equal samples share, 16 bytes.
        sketch: what nearly equal samples mostly share; None if the sample is too simple, or of a kind that has none.
    """

    same: bytes
    sketch: np.ndarray | None = None


@dataclass
class Prints:
    """The fingerprints of all samples of each split, in order."""

    splits: dict[str, list[Print]] = field(default_factory=dict)


def image_print(image: PIL.Image.Image) -> Print:
    """The fingerprint of an opened RGB image: its pixels, whatever the file format."""
    found = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    found.update(image.tobytes())
    sketch = np.asarray(image.resize((SIDE, SIDE), PIL.Image.Resampling.HAMMING), dtype=np.uint8)
    return Print(found.digest(), sketch.reshape(-1))


def sound_print(samples: np.ndarray) -> Print:
    """The fingerprint of an opened sound: its samples at its own rate, whatever the file format."""
    return Print(hashlib.blake2b(np.ascontiguousarray(samples).tobytes(), digest_size=16).digest())


def text_print(texts: Sequence[str]) -> Print:
    """The fingerprint of a text or a pair of texts: case and spaces are ignored, and in the sketch also punctuation."""
    plain = [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts]
    same = hashlib.blake2b("\0".join(plain).encode("utf-8", "replace"), digest_size=16).digest()
    return Print(same, _sketch([_NOT_WORDS.sub(" ", text).split() for text in plain]))


def _sketch(parts: Sequence[Sequence[str]]) -> np.ndarray | None:
    """MinHash (Broder, 1997) of the sets of consecutive words, (:data:`HASHES`,); None for a short text."""
    rows = {
        zlib.crc32(f"{place} {' '.join(words[start : start + WORDS])}".encode("utf-8", "replace"))
        for place, words in enumerate(parts)
        for start in range(len(words) - WORDS + 1)
    }
    if len(rows) < LEAST:
        return None
    hashed = np.fromiter(rows, dtype=np.uint64, count=len(rows))
    return ((_FACTORS * hashed + _TERMS) % _PRIME).min(axis=1).astype(np.uint32)
