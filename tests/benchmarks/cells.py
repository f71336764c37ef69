"""Images preprocessed once and kept in memory, so that training does not wait for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from datasets import Dataset
from torch import Tensor
from transformers import default_data_collator

from hf_ft.data.augment import flip_and_shift
from hf_ft.models.ensemble.processor import column


class Cells(torch.utils.data.Dataset):
    """Images opened and resized once, then kept in memory: for small images, this is the slow part.

    Args:
        size: side to which images are resized. If the parts of a collaborative processor need different sizes, images
            are kept at their original size, and each part resizes them itself.
        augment: flip and shift images on every access, identically for all parts of the processor.
        keep: also keep the processor's output.
    """

    def __init__(self, split: Dataset, processor: Any, size: int, augment: bool = False, keep: bool = False) -> None:
        self.parts = getattr(processor, "processors", [processor])
        self.images = _resized([row["image"].convert("RGB") for row in split], self.parts, size)
        self.labels = split["label"][:]
        self.augment = augment
        self.kept = self._tensors(range(len(self)), augment=False) if keep else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        if self.kept is not None:
            tensors = {name: tensor[rows] for name, tensor in self.kept.items()}
        else:
            tensors = self._tensors(rows, self.augment)
        labels = [self.labels[row] for row in rows]
        return [
            {**{name: tensor[place] for name, tensor in tensors.items()}, "labels": label}
            for place, label in enumerate(labels)
        ]

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def _tensors(self, rows: Sequence[int], augment: bool) -> dict[str, Tensor]:
        state = random.getstate()
        tensors: dict[str, Tensor] = {}
        for index, part in enumerate(self.parts):
            images = [self.images[index][row] for row in rows]
            if augment:
                random.setstate(state)  # the same random draws for every part
                images = [flip_and_shift(image) for image in images]
            made = part(images=images, return_tensors="pt")
            tensors |= {column(name, index): tensor for name, tensor in made.items()}
        return tensors


def _resized(images: list[PIL.Image.Image], parts: Sequence[Any], size: int) -> list[list[PIL.Image.Image]]:
    """For each part, the images at the common size, resized with the part's own interpolation."""
    sizes = [getattr(part, "size", None) for part in parts]
    if any(other != sizes[0] for other in sizes):
        return [images] * len(parts)
    kinds = [PIL.Image.Resampling(getattr(part, "resample", None) or PIL.Image.Resampling.BICUBIC) for part in parts]
    made = {kind: [image.resize((size, size), kind) for image in images] for kind in set(kinds)}
    return [made[kind] for kind in kinds]


def channels_last(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack rows in channels-last memory format: convolutions on a CPU run up to 1.5 times faster."""
    batch = default_data_collator(rows)
    return {
        name: tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        for name, tensor in batch.items()
    }
