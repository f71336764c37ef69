"""Random changes of training images: flips and shifts, and the policies of three papers.

The operations of the policies are kornia's, as functions of an image: with the strengths of the papers, they equal
Pillow's, which the papers' experiments used, up to one of 255 levels. kornia's own policies are not used: their ranges
and operations differ (``docs/augmentation.md`` lists how).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from hf_ft.data.streams import mixed
from hf_ft.errors import DataError

Image = PIL.Image.Image
GREY, BLACK = 128 / 255, 0.0  # what moves into view in the code of AutoAugment and RandAugment, and of TrivialAugment
IMAGENET_SIDE = 224  # pixels; the papers give shifts in pixels of such an image
MIRRORED = 0.5  # probability of a horizontal flip before a policy, as in the papers' experiments


def flip_and_shift(image: Image) -> Image:
    """Flip horizontally with probability 0.5 and shift by up to 1/8 of each side, reflecting at the edge.

    Draws from Python's ``random``, whose state the Trainer saves in its checkpoints and restores.
    """
    pixels = np.asarray(image)
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    rows, columns = _shifted(pixels.shape[0]), _shifted(pixels.shape[1])
    return PIL.Image.fromarray(pixels[rows][:, columns])


def _shifted(side: int) -> np.ndarray:
    index = np.abs(np.arange(side) + random.randint(-(side // 8), side // 8))
    return np.minimum(index, 2 * (side - 1) - index)  # reflected at the edge, without repeating it


# --- operations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strength:
    """The range of an operation's strength: ``low`` at level 0, ``high`` at level 1; ``signed`` draws its sign too."""

    low: float
    high: float
    signed: bool = False

    def at(self, level: float) -> float:
        value = self.low + (self.high - self.low) * level
        return -value if self.signed and random.random() < 0.5 else value


@cache
def _kornia() -> Any:
    try:
        import kornia
    except ImportError as error:
        raise ImportError(f"kornia is needed for this augmentation ({error}): pip install 'hf-ft[augment]'") from error
    return kornia


def _enhance(name: str) -> Callable[[Tensor, float, float], Tensor]:
    return lambda image, value, fill: getattr(_kornia().enhance, name)(image, value)


def _moved(image: Tensor, rows: Sequence[Sequence[float]], fill: float) -> Tensor:
    """Move pixels by an affine map (2 x 3) of their positions (x, y), without interpolating between them."""
    matrix, colour = torch.tensor([rows], dtype=image.dtype), torch.full((3,), fill)
    warp = _kornia().geometry.transform.warp_affine
    return warp(image, matrix, image.shape[-2:], mode="nearest", padding_mode="fill", fill_value=colour)


def _rotated(image: Tensor, degrees: float, fill: float) -> Tensor:
    height, width = image.shape[-2:]
    centre = torch.tensor([[(width - 1) / 2, (height - 1) / 2]])
    turn = _kornia().geometry.transform.get_rotation_matrix2d(centre, torch.tensor([degrees]), torch.ones(1, 2))
    return _moved(image, turn[0].tolist(), fill)


def _auto_contrast(image: Tensor, value: float, fill: float) -> Tensor:
    flat = image.amin((-2, -1), keepdim=True) == image.amax((-2, -1), keepdim=True)
    return torch.where(flat, image, _kornia().enhance.normalize_min_max(image))


# Of a float image (1, 3, H, W) in [0, 1], a strength, and the colour of what moves into view.
OPERATIONS: Mapping[str, Callable[[Tensor, float, float], Tensor]] = {
    "identity": lambda image, value, fill: image,
    "auto_contrast": _auto_contrast,
    "equalize": lambda image, value, fill: _kornia().enhance.equalize(image),
    "invert": lambda image, value, fill: _kornia().enhance.invert(image),
    "posterize": lambda image, value, fill: _kornia().enhance.posterize(image, int(value)),
    # A pixel at the threshold is inverted; above 1 there is none.
    "solarize": lambda image, value, fill: _kornia().enhance.solarize(image, value if value < 1 else 2.0),
    "color": _enhance("adjust_saturation_with_gray_subtraction"),
    "contrast": _enhance("adjust_contrast_with_mean_subtraction"),
    "brightness": _enhance("adjust_brightness_accumulative"),
    "sharpness": _enhance("sharpness"),
    "rotate": _rotated,
    # From the corner of the image, as Pillow counts: the centre of the first pixel lies half a pixel from it.
    "shear_x": lambda image, value, fill: _moved(image, [[1, -value, -value / 2], [0, 1, 0]], fill),
    "shear_y": lambda image, value, fill: _moved(image, [[1, 0, 0], [-value, 1, -value / 2]], fill),
    "translate_x": lambda image, value, fill: _moved(image, [[1, 0, round(value * image.shape[-1])], [0, 1, 0]], fill),
    "translate_y": lambda image, value, fill: _moved(image, [[1, 0, 0], [0, 1, round(value * image.shape[-2])]], fill),
}

NO_STRENGTH = Strength(0.0, 0.0)


def _strengths(enhanced: Strength, bits: float, rotate: float, shear: float, translate: float) -> dict[str, Strength]:
    """The 14 operations of RandAugment and TrivialAugment, with these ranges."""
    return {
        **dict.fromkeys(("identity", "auto_contrast", "equalize"), NO_STRENGTH),
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), enhanced),
        "posterize": Strength(bits, 8.0),
        "solarize": Strength(0.0, 1.0),
        "rotate": Strength(0.0, rotate, signed=True),
        **dict.fromkeys(("shear_x", "shear_y"), Strength(0.0, shear, signed=True)),
        **dict.fromkeys(("translate_x", "translate_y"), Strength(0.0, translate / IMAGENET_SIDE, signed=True)),
    }


# The table in the appendix of AutoAugment, whose ranges RandAugment uses; shifts as in RandAugment's code for ImageNet.
STANDARD = _strengths(Strength(0.1, 1.9), bits=4, rotate=30, shear=0.3, translate=100)
# TrivialAugment's wide search space.
WIDE = _strengths(Strength(0.01, 2.0), bits=2, rotate=135, shear=0.99, translate=32)


# --- policies -----------------------------------------------------------------------------------------------

# An operation, its probability, and the level of its strength in [0, 1].
Steps = list[tuple[str, float, float]]


def _trivial() -> Steps:
    return [(random.choice(list(WIDE)), 1.0, random.randint(0, 30) / 30)]


def _rand(count: int = 2, magnitude: int = 9) -> Steps:
    return [(name, 1.0, magnitude / 10) for name in random.choices(list(STANDARD), k=count)]


def _auto() -> Steps:
    from kornia.augmentation.auto.autoaugment.autoaugment import imagenet_policy  # the paper's 25 pairs of operations

    return [(name, probability, (level or 0) / 10) for name, probability, level in random.choice(imagenet_policy)]


@dataclass(frozen=True)
class Policy:
    """Random operations on an image; all draws are from Python's ``random``.

    Attributes:
        steps: draws the operations.
        strengths: the ranges of their strengths.
        fill: the colour of what moves into view, in [0, 1].
        paper: where it is from.
    """

    steps: Callable[[], Steps]
    strengths: Mapping[str, Strength]
    fill: float
    paper: str

    def __call__(self, image: Image) -> Image:
        """Flip horizontally with probability 0.5, then apply the operations; RGB in, RGB out."""
        if random.random() < MIRRORED:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        steps = self.steps()
        # Draws are in [0, 1): probability 1 always applies an operation, 0 never.
        chosen = [(name, level) for name, probability, level in steps if random.random() < probability]
        chosen = [(name, level) for name, level in chosen if name != "identity"]
        if not chosen:
            return image
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        for name, level in chosen:
            pixels = OPERATIONS[name](pixels, self.strengths.get(name, NO_STRENGTH).at(level), self.fill)
        return PIL.Image.fromarray((pixels[0] * 255).round().byte().permute(1, 2, 0).numpy())


POLICIES: Mapping[str, Policy] = {
    "trivial": Policy(_trivial, WIDE, BLACK, "Müller and Hutter, ICCV 2021"),
    "rand": Policy(_rand, STANDARD, GREY, "Cubuk et al., NeurIPS 2020"),
    "auto": Policy(_auto, STANDARD, GREY, "Cubuk et al., CVPR 2019"),
}
AUGMENTATIONS: dict[str, Callable[[Image], Image] | None] = {"none": None, "basic": flip_and_shift, **POLICIES}


def check_augmentation(augment: str, task: str = "image") -> None:
    """Check that an augmentation exists, suits the data, and can run here.

    Raises:
        DataError: if it is unknown, or the data are not images.
        ImportError: if it needs a package that is missing; the message says how to install it.
    """
    if augment not in AUGMENTATIONS:
        raise DataError(f"augment={augment!r} is unknown: choose one of {', '.join(AUGMENTATIONS)}")
    if augment != "none" and task != "image":
        raise DataError(f"augment={augment!r} changes images, but these data are {task}: use none")
    if augment in POLICIES:
        _kornia()  # loaded here, so that worker processes need not


# --- draws --------------------------------------------------------------------------------------------------

_epoch: ContextVar[int | None] = ContextVar("_epoch", default=None)


@contextmanager
def drawn_for(epoch: int) -> Iterator[None]:
    """Within this context, what is drawn for an image depends only on this number and on the image.

    Args:
        epoch: a seed that differs in each epoch.
    """
    token = _epoch.set(epoch)
    try:
        yield
    finally:
        _epoch.reset(token)


def augmented(images: Sequence[Image], change: Callable[[Image], Image], rows: Sequence[int] | None) -> list[Image]:
    """Change each image with random numbers of its own, whatever other images it is read with.

    They follow from the image and from :func:`drawn_for`, or else from a number drawn from Python's ``random``.

    Args:
        change: draws from Python's ``random``.
        rows: numbers of the images in their source; None to tell them apart by their pixels.
    """
    epoch = _epoch.get()
    key = random.getrandbits(32) if epoch is None else epoch
    state = random.getstate()
    try:
        changed = []
        for place, image in enumerate(images):
            random.seed(mixed(key, zlib.crc32(image.tobytes()) if rows is None else rows[place]))
            changed.append(change(image))
        return changed
    finally:
        random.setstate(state)


def shrunk(image: Image, side: int | None) -> Image:
    """The image with its shorter side at most ``side``: the time for a policy grows with the pixels."""
    if side is None or min(image.size) <= side:
        return image
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
