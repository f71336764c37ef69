"""Random samples: noise of several sizes, to trace a model and to check it without data."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from PIL import Image
from scipy.io import wavfile

from hf_ft.data.columns import Columns
from hf_ft.data.inputs import Inputs
from hf_ft.inference.checkpoint import Trained

# Landscape, portrait and square; larger and smaller than a processor's output.
_IMAGES = ((48, 64), (300, 211), (33, 33), (97, 260), (224, 224), (64, 40))
_WORDS = (12, 3, 25, 1, 7, 18)
_SECONDS = (1.0, 1.5, 0.8, 1.0, 2.0, 1.5)


def random_inputs(trained: Trained) -> Inputs:
    """Six samples of the kind that a model takes, the same each time."""
    rng, task = np.random.default_rng(0), trained.wanted.task
    if task == "image":
        files = [_image(rng, *size) for size in _IMAGES]
        rows = _of_files(task, files)
    elif task == "audio":
        files = [_sound(rng, trained.processor.sampling_rate, seconds) for seconds in _SECONDS]
        rows = _of_files(task, files)
    else:
        texts = [_text(rng, trained.processor, words) for words in _WORDS]
        rows = Dataset.from_dict({task: texts}, features=Features({task: Value("string")}))
    return Inputs(rows, Columns(task, (task,), "", trained.wanted.problem_type, trained.wanted.names))


def _of_files(column: str, files: list[dict[str, Any]]) -> Dataset:
    # The types for images and sounds would open them, which for sounds needs torchcodec.
    stored = {"bytes": Value("binary"), "path": Value("string")}
    return Dataset.from_dict({column: files}, features=Features({column: stored}))


def _image(rng: np.random.Generator, height: int, width: int) -> dict[str, Any]:
    """A smooth image with some noise, as PNG."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-20, 21, (height, width, 3))
    return _bytes(lambda file: Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG"))


def _sound(rng: np.random.Generator, rate: int, seconds: float) -> dict[str, Any]:
    noise = rng.uniform(-0.5, 0.5, int(rate * seconds)).astype(np.float32)
    return _bytes(lambda file: wavfile.write(file, rate, noise))


def _text(rng: np.random.Generator, tokenizer: Any, words: int) -> str:
    """Random tokens of the vocabulary."""
    first = getattr(tokenizer, "tokenizers", [tokenizer])[0]
    special = set(first.all_special_ids)
    known = sorted(number for number in first.get_vocab().values() if number not in special)
    return first.decode(rng.choice(known, words).tolist()) or "a"


def _bytes(write: Any) -> dict[str, Any]:
    file = BytesIO()
    write(file)
    return {"bytes": file.getvalue(), "path": None}
