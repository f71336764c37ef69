"""Every image, text, audio and video classification class of the installed Transformers, tiny, with samples for it.

>>> model = tiny("Wav2Vec2ForSequenceClassification")
>>> rows = samples(model, 4)  # a batch of tensors, with labels

``python -m hf_ft.testing.families`` builds all of them and asks for logits of (batch, classes).
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.models.auto import modeling_auto

from hf_ft.models.tasks import TASKS, mapping_name
from hf_ft.testing.configs import CLASSES, PIXELS, tiny_config
from hf_ft.testing.models import set_running_statistics

TOKENS = 12
WAVE = 640
"""Samples of a sound; about 30 frames behind the tiny convolutions."""

UNBUILDABLE = {
    "ShieldGemma2ForImageClassification": "answers yes or no to a policy in a prompt; it has no classes to train",
    "TimmWrapperForImageClassification": "needs timm, and the name of one of its networks",
    "LayoutLMv2ForSequenceClassification": "needs detectron2",
    "DinatForImageClassification": "needs natten",
}
"""Classes of the mappings that cannot be built here, with the reason."""

FAULTY = {"PPLCNetForImageClassification": "returns neither logits nor a loss"}
"""Classes that are built, but cannot be trained by the Trainer."""


def families() -> dict[str, str]:
    """The task (image, text, audio, video) of every classification class that can be built, by the class's name."""
    found: dict[str, str] = {}
    for task in TASKS:
        for names in getattr(modeling_auto, f"{mapping_name(task)}_NAMES").values():
            for name in (names,) if isinstance(names, str) else names:
                if name not in UNBUILDABLE:
                    found.setdefault(name, task)
    return found


def tiny(name: str, seed: int = 0, **fields: Any) -> hf.PreTrainedModel:
    """A random tiny model of a class, in eval mode; the global RNG state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(hf, name)(tiny_config(name, families()[name] == "text", **fields))
        set_running_statistics(model, lambda: samples(model, 16, seed))
        return model.eval()


def samples(model: hf.PreTrainedModel, count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Random samples in the form that the model's forward takes, with labels (count,).

    Texts are padded on the right, by up to three tokens, and end with the end token.
    """
    random = torch.Generator().manual_seed(seed)
    task = families()[type(model).__name__]
    rows = {"image": _images, "text": _texts, "audio": _sounds, "video": _videos}[task](model, count, random)
    return rows | {"labels": torch.arange(count) % (model.config.num_labels or 1)}


def _images(model: Any, count: int, random: torch.Generator) -> dict[str, Tensor]:
    config, name = model.config, _input(model)
    if name == "input_ids":  # ImageGPT: an image is a sequence of colours
        return {name: torch.randint(config.vocab_size - 1, (count, PIXELS), generator=random)}
    side = getattr(config, "image_size", PIXELS)
    pixels = max(side if isinstance(side, int) else PIXELS, PIXELS)
    if "spatial_shapes" in _parameters(model):  # Siglip2: patches of images of any shape
        patch, patches = config.vision_config.patch_size, config.vision_config.num_patches
        shape = torch.full((count, 2), int(patches**0.5))
        rows = torch.randn(count, patches, 3 * patch**2, generator=random)
        return {name: rows, "pixel_attention_mask": torch.ones(count, patches).long(), "spatial_shapes": shape}
    return {name: torch.randn(count, getattr(config, "num_channels", 3), pixels, pixels, generator=random)}


def _texts(model: Any, count: int, random: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (count, TOKENS), generator=random)
    mask = torch.ones_like(ids)
    for row in range(count):
        length = TOKENS - row % 4
        ids[row, length - 1], ids[row, length:], mask[row, length:] = 2, 0, 0
    rows = {_input(model): ids, "attention_mask": mask}
    if "bbox" in _parameters(model):
        corner = torch.randint(20, (count, TOKENS, 2), generator=random)
        rows["bbox"] = torch.cat([corner, corner + torch.randint(1, 20, corner.shape, generator=random)], dim=-1)
    return rows


def _sounds(model: Any, count: int, random: torch.Generator) -> dict[str, Tensor]:
    config, name = model.config, _input(model)
    shape: tuple[int, ...] = (WAVE,)
    if hasattr(config, "feature_projection_input_dim"):  # wav2vec2-bert: frames of mel values
        shape = (24, config.feature_projection_input_dim)
    elif hasattr(config, "num_mel_bins"):  # AST: a spectrogram over time; Whisper: one whose time is last
        whisper = hasattr(config, "max_source_positions")
        shape = (config.num_mel_bins, 2 * config.max_source_positions) if whisper else (32, config.num_mel_bins)
    return {name: torch.randn(count, *shape, generator=random)}


def _videos(model: Any, count: int, random: torch.Generator) -> dict[str, Tensor]:
    return {_input(model): torch.randn(count, 4, 3, PIXELS, PIXELS, generator=random)}


def _input(model: Any) -> str:
    """The name of the input in the forward: some classes use another name for their main input."""
    names = _parameters(model)
    return model.main_input_name if model.main_input_name in names else next(iter(names))


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def check(names: Iterator[str]) -> dict[str, str]:
    """Build each, and compute the logits of a batch and a gradient; the faults by name, none if all is well."""
    faults = {}
    for name in names:
        if name in FAULTY:
            continue
        begun = time.perf_counter()
        try:
            model = tiny(name)
            spread = model(**samples(model)).logits.std(0).max()
            logits = model.train()(**samples(model)).logits
            assert logits.flatten(1).shape == (4, CLASSES), f"logits of {tuple(logits.shape)}"
            assert logits.isfinite().all(), f"{logits}"
            assert 1e-4 < spread < 1e4, f"logits spread by {spread:.2g} between samples"
            logits.square().sum().backward()
            took = time.perf_counter() - begun
            size = sum(parameter.numel() for parameter in model.parameters())
            if took > 0.5 or size > 200_000:
                print(f"{name}: {took:.2f} s, {size:,} parameters")
        except Exception as error:  # a report of all of them is wanted
            faults[name] = f"{type(error).__name__}: {error}"
            print(f"FAULT {name}: {faults[name][:200]}", flush=True)
    return faults


if __name__ == "__main__":
    raise SystemExit(bool(check(iter(sys.argv[1:] or families()))))
