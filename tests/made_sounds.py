"""Sounds that are easy to tell apart: tones of two pitches, in one folder per class."""

from pathlib import Path

import numpy as np
from scipy.io import wavfile

RATE = 8000
PITCHES = {"high": 1500, "low": 300}


def tone(pitch: float, seconds: float = 0.2, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """A noisy tone, (samples,) in [-1, 1]."""
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.05, len(times))
    return (0.5 * np.sin(2 * np.pi * pitch * times) + noise).astype(np.float32)


def write(file: Path, samples: np.ndarray, rate: int = RATE) -> None:
    """Write 16-bit samples, (samples,) or (samples, channels)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(file, rate, np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16))


def sounds(folder: Path, each: int = 10) -> Path:
    """A folder with a subfolder for each class; the sounds differ in length."""
    for name, pitch in PITCHES.items():
        for number in range(each):
            write(folder / name / f"{number}.wav", tone(pitch, 0.15 + 0.01 * (number % 5), seed=number))
    return folder
