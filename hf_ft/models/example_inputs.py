"""Example inputs for any classifier, made from its config and the signature of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Some models need a multiple of their chunk or window, others exactly the length of their position embeddings.
_LENGTHS = (16, 64, 128)
_IMAGE_SIZES = (64, 224)
_LONGEST = 4096
_FRAMES = 48  # of audio, after the convolutions that shorten it


def example_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Batches of one sample that a classifier might take, most likely first; a caller tries them in turn.

    Images are ``pixel_values`` (1, C, H, W), or patches with ``spatial_shapes``; videos (1, T, C, H, W); text is
    ``input_ids`` and ``attention_mask`` (1, L), with ``bbox`` (1, L, 4) for documents; audio is ``input_values`` or
    ``input_features``. A module that is not from Transformers gets an image if its first layer is a convolution.
    """
    accepted = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    if config is None:
        made = _plain(model, list(accepted))
    else:
        made = _for_config(_Sizes(config, model), accepted, getattr(model, "main_input_name", ""))
    parameter = next(iter(model.parameters()), torch.zeros(()))
    for batch in made:
        yield {
            k: v.to(parameter.device, parameter.dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()
        }


class _Sizes:
    """Values of a config, including those of its parts for text, images and audio."""

    def __init__(self, config: Any, model: nn.Module) -> None:
        names = ("text_config", "vision_config", "audio_config", "encoder", "decoder")
        parts = [getattr(config, name, None) for name in names]
        self.configs = [config, *(part for part in parts if part is not None)]
        pretrained = getattr(config, "pretrained_cfg", None)  # of timm
        self.timm = pretrained if isinstance(pretrained, dict) else {}

    def __call__(self, *names: str) -> Any:
        values = (getattr(config, name, None) for name in names for config in self.configs)
        return next((value for value in values if value is not None), None)

    @property
    def channels(self) -> int:
        return int((self.timm.get("input_size") or [self("num_channels", "in_channels", "in_chans") or 3])[0])

    @property
    def images(self) -> list[tuple[int, int]]:
        """Heights and widths to try."""
        given = self.timm.get("input_size", [None])[1:] or self("image_size", "crop_size", "input_size")
        if isinstance(given, dict):
            given = list(given.values())
        known = [] if given is None else [tuple(given) if isinstance(given, (tuple, list)) else (given, given)]
        return [*known, *((size, size) for size in _IMAGE_SIZES)]

    @property
    def lengths(self) -> list[int]:
        """Numbers of tokens to try."""
        longest = self("max_position_embeddings", "n_positions", "max_seq_len")
        given = [self("segment_means_seq_len", "seq_length"), longest]
        known = [length for length in given if isinstance(length, int) and 0 < length <= _LONGEST]
        limited = isinstance(longest, int) and longest > 0  # XLNet's is -1
        fitting = [length for length in _LENGTHS if not limited or length <= longest]
        return list(dict.fromkeys([*fitting, *known]))


def _for_config(sizes: _Sizes, accepted: Any, main: str) -> Iterator[dict[str, Tensor]]:
    if "input_ids" in accepted and not main.startswith(("pixel_values", "input_values", "input_features")):
        yield from _texts(sizes, accepted)
    for name in ("pixel_values_videos", "pixel_values"):
        if name in accepted:
            yield from _images(sizes, accepted, name)
    if "input_values" in accepted or "input_features" in accepted:
        yield from _sounds(sizes, accepted)


def _texts(sizes: _Sizes, accepted: Any) -> Iterator[dict[str, Tensor]]:
    batches = [_text(sizes, accepted, length) for length in sizes.lengths]
    for batch in batches:
        if "bbox" in accepted and "pixel_values" in accepted:  # a page: its words and its picture
            for image in _images(sizes, (), "pixel_values"):
                yield {**batch, **image}
        yield batch
    for batch in batches:  # such as a language id that has no default
        ids = [name for name in accepted if name.endswith("_ids") and name not in batch]
        yield {**batch, **{name: torch.zeros_like(batch["input_ids"]) for name in ids}}
        yield {**batch, **{name: torch.zeros(1, dtype=torch.long) for name in ids}}


def _text(sizes: _Sizes, accepted: Any, length: int) -> dict[str, Tensor]:
    """Tokens that are neither special nor padding, and the end of the text, which encoder-decoders look for."""
    special = {sizes("pad_token_id"), sizes("bos_token_id"), sizes("eos_token_id"), sizes("image_token_id"), 0, 1, 2}
    ids = [number for number in range(min(sizes("vocab_size") or 100, 1000)) if number not in special] or [0]
    input_ids = torch.tensor([[ids[place % len(ids)] for place in range(length)]])
    end = sizes("eos_token_id")
    if isinstance(end, int) and 0 <= end < (sizes("vocab_size") or 0):
        input_ids[0, -1] = end
    batch = {"input_ids": input_ids}
    if "attention_mask" in accepted:
        batch["attention_mask"] = torch.ones_like(input_ids)
    if "bbox" in accepted:
        batch["bbox"] = torch.zeros(1, length, 4, dtype=torch.long)
    return batch


def _images(sizes: _Sizes, accepted: Any, name: str) -> Iterator[dict[str, Tensor]]:
    frames = sizes("num_frames", "frames_per_clip")
    for height, width in sizes.images:
        if "spatial_shapes" in accepted:
            patch = sizes("patch_size") or 16
            grid = max(height // patch, 2)
            values = torch.randn(1, grid * grid, sizes.channels * patch * patch)
            shapes, mask = torch.tensor([[grid, grid]]), torch.ones(1, grid * grid, dtype=torch.long)
            yield {name: values, "spatial_shapes": shapes, "pixel_attention_mask": mask}
        if isinstance(frames, int):
            yield {name: torch.randn(1, frames, sizes.channels, height, width)}
        yield {name: torch.randn(1, sizes.channels, height, width)}


def _sounds(sizes: _Sizes, accepted: Any) -> Iterator[dict[str, Tensor]]:
    mels, width = sizes("num_mel_bins"), sizes("feature_projection_input_dim")
    frames = sizes("max_length") or _FRAMES
    shapes: dict[str, list[tuple[int, ...]]] = {"input_features": [], "input_values": []}
    if mels:
        positions = sizes("max_source_positions")
        shapes["input_features"] += [(1, mels, 2 * positions)] if positions else []
        shapes["input_values"] += [(1, frames, mels)]
    if width:
        shapes["input_features"] += [(1, _FRAMES, width)]
    shapes["input_values"] += [(1, _FRAMES * (sizes("inputs_to_logits_ratio") or 320))]
    for name, options in shapes.items():
        if name in accepted:
            yield from ({name: torch.randn(shape)} for shape in options)


def _plain(model: nn.Module, accepted: list[str]) -> Iterator[dict[str, Tensor]]:
    """An image or a vector for a module without a config, by its first layer."""
    first = next((module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))), None)
    if accepted and isinstance(first, nn.Conv2d):
        for size in _IMAGE_SIZES:
            yield {accepted[0]: torch.randn(1, first.in_channels, size, size)}
    elif accepted and isinstance(first, nn.Linear):
        yield {accepted[0]: torch.randn(1, first.in_features)}
