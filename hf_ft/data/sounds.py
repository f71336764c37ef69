"""Open sounds: one channel, at the sampling rate of the model, of a limited length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from scipy.signal import resample_poly
from transformers import default_data_collator

from hf_ft.data.columns import ROW, Columns
from hf_ft.errors import DataError

SECONDS = 20.0
"""Length in seconds to which sounds are cut by default, as in Transformers' example of audio classification."""


def open_sound(value: Any, row: int, rate: int, seconds: float = SECONDS) -> np.ndarray:
    """Open a sound as one channel of float32 in [-1, 1], resampled.

    Args:
        value: a path, or a dictionary of ``path`` and ``bytes``.
        row: row number in the source, for the error message.
        rate: samples per second of the result.
        seconds: what comes later is cut off.

    Returns:
        (samples,)

    Raises:
        DataError: if it cannot be read; the message names row and path.
        ImportError: if soundfile is missing; the message contains the pip command.
    """
    try:
        return _opened(value, rate, seconds)
    except ImportError:
        raise
    except Exception as error:  # a damaged file makes libsndfile raise almost anything
        path = value if isinstance(value, str) else (value or {}).get("path")
        raise DataError(
            f"cannot read the sound in row {row} ({path or 'no path'}): {reason_of_sound(error)}"
        ) from error


def reason_of_sound(error: Exception) -> str:
    """Why a sound cannot be opened, without the path, which is reported separately."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = str(error)
    return text.rpartition(": ")[2].rstrip(".") if text.startswith("Error opening") else text or type(error).__name__


def open_whole(value: Any) -> np.ndarray:
    """All of a sound as one channel at its own rate, (samples,); for errors, see :func:`reason_of_sound`."""
    return _opened(value, None, math.inf)


def _opened(value: Any, rate: int | None, seconds: float) -> np.ndarray:
    if value is None:
        raise DataError("there is no sound")
    value = {"path": value, "bytes": None} if isinstance(value, str) else value
    file = value["path"] if value.get("bytes") is None else BytesIO(value["bytes"])
    with _soundfile().SoundFile(open(file, "rb") if isinstance(file, str) else file) as sound:
        frames = -1 if math.isinf(seconds) else math.ceil(seconds * sound.samplerate)
        samples, native = sound.read(frames, dtype="float32", always_2d=True), sound.samplerate
    if not len(samples):
        raise DataError("it has no samples")
    mono = samples.mean(axis=1)
    return mono if rate is None or rate == native else resampled(mono, native, rate)


def resampled(samples: np.ndarray, native: int, rate: int) -> np.ndarray:
    """Resample by a polyphase filter, (samples,) to (samples * rate / native,)."""
    shared = math.gcd(native, rate)
    return resample_poly(samples, rate // shared, native // shared).astype(np.float32)


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise ImportError(f"soundfile is needed to read sounds ({error}): pip install 'hf-ft[audio]'") from error
    return soundfile


def _sound_batch(batch: dict[str, list[Any]], extractor: Any, columns: Columns, seconds: float) -> dict[str, Any]:
    values = batch[columns.inputs[0]]
    rows = batch.get(ROW, range(len(values)))
    rate = extractor.sampling_rate
    ready: list[dict[str, Any]] = []
    for value, row in zip(values, rows, strict=True):
        sound = open_sound(value, row, rate, seconds)
        found = extractor(sound, sampling_rate=rate, return_tensors="np")
        ready.append({name: column[0] for name, column in found.items()})
    columns_of = {name: [one[name] for one in ready] for name in (ready[0] if ready else {})}
    return columns_of | ({"labels": columns.encode(batch[columns.label])} if columns.label in batch else {})


def sound_transform(extractor: Any, columns: Columns, seconds: float = SECONDS) -> Callable[[dict[str, Any]], Any]:
    """Create the transform for ``Dataset.set_transform`` that opens, resamples, cuts and processes a batch of sounds.

    Each sound is processed on its own, so that padding does not depend on the batch that it is read with.
    """
    return partial(_sound_batch, extractor=extractor, columns=columns, seconds=seconds)


class SoundCollator:
    """Pads sounds to the longest of the batch, as the feature extractor of the model pads.

    Args:
        extractor: the feature extractor of the model.
    """

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = self.extractor.model_input_names
        inputs = [{name: value for name, value in row.items() if name in names} for row in rows]
        others = [{name: value for name, value in row.items() if name not in names} for row in rows]
        return {**self.extractor.pad(inputs, padding=True, return_tensors="pt"), **default_data_collator(others)}
