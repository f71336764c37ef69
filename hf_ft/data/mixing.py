"""Mixup and CutMix: batches of mixed images, with the labels of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ft.errors import DataError, OptionError


@dataclass(frozen=True)
class Mixing:
    r"""Mix the images of a batch with those of a permutation of it, and their labels likewise.

    .. math:: \tilde x = \lambda x + (1 - \lambda) x_\pi, \qquad \tilde y = \lambda y + (1 - \lambda) y_\pi, \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    CutMix replaces a rectangle instead, with the share :math:`1 - \lambda` of the area. The permutation and
    :math:`\lambda` are drawn once per batch. If both are given, each batch uses one of them, with probability 0.5.

    Args:
        mixup: :math:`\alpha` of mixup; 0 for none.
        cutmix: :math:`\alpha` of CutMix; 0 for none.

    Raises:
        OptionError: if one is negative or not finite.

    Reference: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix", ICCV 2019.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                usual = {"mixup": "0.2", "cutmix": "1"}[name]
                raise OptionError(f"{name}={value!r} must be 0, for none, or a positive number, such as {usual}.")

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self.given.items())

    @property
    def given(self) -> dict[str, float]:
        """The ones that are used, by name."""
        return {name: value for name in ("mixup", "cutmix") if (value := getattr(self, name))}

    def check_task(self, task: str) -> None:
        """Check that there are images to mix.

        Raises:
            OptionError: if the data are of another kind.
        """
        if self and task != "image":
            raise OptionError(f"{self}: only images can be mixed, but these data are {task}. Leave it out.")

    def __call__(self, batch: Mapping[str, Any], classes: int | None, seed: int) -> dict[str, Any]:
        """The batch, mixed.

        Args:
            batch: images (B, ..., H, W), of one or several columns, and ``labels``.
            classes: C; labels (B,) of classes become shares (B, C). None for labels that are numbers already: for
                regression, or 0 and 1 for several labels.
            seed: determines all random draws.

        Raises:
            DataError: if the batch has no images or no labels.
        """
        images = {name: value for name, value in batch.items() if _are_images(value)}
        if not images or not isinstance(batch.get("labels"), Tensor):
            raise DataError(f"{self}: only batches of images with labels can be mixed, not of {sorted(batch)}.")
        draw = np.random.default_rng(seed)
        cuts = self.cutmix > 0 and (self.mixup == 0 or draw.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share = float(draw.beta(alpha, alpha))
        partners = torch.from_numpy(draw.permutation(len(batch["labels"])))
        if cuts:
            box = _box(share, *draw.random(2))
            mixed = {name: _pasted(image, partners, box) for name, image in images.items()}
            share = _kept(next(iter(images.values())), box)
        else:
            mixed = {name: _blended(image, partners, share) for name, image in images.items()}
        labels = batch["labels"].float() if classes is None else class_shares(batch["labels"], classes)
        return {**batch, **mixed, "labels": _blended(labels, partners, share)}


def class_shares(labels: Tensor, classes: int) -> Tensor:
    """Class numbers (B,) as shares (B, C): 1 for the class, and 0 throughout for a row without label (-100)."""
    known = labels >= 0
    return torch.nn.functional.one_hot(labels.clamp(min=0).long(), classes).float() * known[:, None]


def _are_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 4


def _blended(one: Tensor, partners: Tensor, share: float) -> Tensor:
    return torch.lerp(one, one[partners], 1 - share)


Box = tuple[float, float, float, float]  # left, right, top, bottom, as fractions of the sides


def _box(share: float, x: float, y: float) -> Box:
    """A box of area 1 - share around a point, clipped at the edges of the image: the paper's equation 2."""
    half = math.sqrt(1 - share) / 2
    return max(0.0, x - half), min(1.0, x + half), max(0.0, y - half), min(1.0, y + half)


def _pixels(image: Tensor, box: Box) -> tuple[slice, slice]:
    left, right, top, bottom = box
    height, width = image.shape[-2:]
    return slice(round(top * height), round(bottom * height)), slice(round(left * width), round(right * width))


def _pasted(image: Tensor, partners: Tensor, box: Box) -> Tensor:
    rows, columns = _pixels(image, box)
    pasted = image.clone()
    pasted[..., rows, columns] = image[partners][..., rows, columns]
    return pasted


def _kept(image: Tensor, box: Box) -> float:
    """The share of the pixels outside the box: clipping at an edge, and rounding, change it."""
    rows, columns = _pixels(image, box)
    height, width = image.shape[-2:]
    return 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
