"""The steps of a processor, as numbers that suffice to do the same without Transformers."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from hf_ft.data.images import open_rgb
from hf_ft.inference.batches import Batches
from hf_ft.inference.checkpoint import Trained
from hf_ft.models.ensemble.processor import column

TOKENIZER = "export_tokenizer.json"
_RESAMPLING = {one.value: one.name.lower() for one in Image.Resampling}
_NOT_TOLD = {"_processor_class", "name_or_path", "_name_or_path", "auto_map"}


def image_steps(processor: Any) -> dict[str, Any] | None:
    """The steps of an image processor; None if they differ in kind from those of :func:`prepared_image`."""
    size, crop = _sides(processor, "size"), None
    resize: dict[str, int] | None = None
    if getattr(processor, "do_resize", False):
        resize, crop = _resize(size, getattr(processor, "crop_pct", None))
        if resize is None:
            return None
    if getattr(processor, "do_center_crop", False):
        crop = _sides(processor, "crop_size")
        if set(crop) != {"height", "width"}:
            return None
    scaled, normalized = getattr(processor, "do_rescale", False), getattr(processor, "do_normalize", False)
    mean = _channels(processor.image_mean) if normalized else [0.0] * 3
    offset = 1.0 if scaled and getattr(processor, "rescale_offset", False) else 0.0
    return {
        "resize": resize,
        "resample": _RESAMPLING.get(int(getattr(processor, "resample", None) or Image.Resampling.BILINEAR)),
        "crop": crop,
        "scale": float(processor.rescale_factor) if scaled else 1.0,
        "mean": [one + offset for one in mean],
        "std": _channels(processor.image_std) if normalized else [1.0] * 3,
        "channels": "BGR" if getattr(processor, "do_flip_channel_order", False) else "RGB",
        "layout": "NCHW",
    }


def prepared_image(image: Image.Image, steps: dict[str, Any]) -> np.ndarray:
    """An upright RGB image (H, W, 3) as input of a model, (3, H', W') in float32, with Pillow and NumPy alone."""
    if (size := steps["resize"]) is not None:
        edge, short = size.get("shortest_edge"), min(image.size)
        wanted = [edge * side // short for side in image.size] if edge else [size["width"], size["height"]]
        image = image.resize((wanted[0], wanted[1]), Image.Resampling[steps["resample"].upper()])
    if (crop := steps["crop"]) is not None:
        left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    pixels = (np.asarray(image) * steps["scale"] - steps["mean"]) / steps["std"]
    pixels = pixels[..., ::-1] if steps["channels"] == "BGR" else pixels
    return pixels.transpose(2, 0, 1).astype(np.float32)


def _resize(size: dict[str, int], crop_pct: float | None) -> tuple[dict[str, int] | None, dict[str, int] | None]:
    """The size before and after a crop that belongs to resizing, as ConvNeXT's processor has it."""
    if set(size) == {"height", "width"}:
        return size, None
    if set(size) != {"shortest_edge"}:
        return None, None
    edge = size["shortest_edge"]
    if crop_pct is None:
        return size, None
    square = {"height": edge, "width": edge}
    return (square, None) if edge >= 384 else ({"shortest_edge": int(edge / crop_pct)}, square)


def _sides(processor: Any, name: str) -> dict[str, int]:
    return {key: int(value) for key, value in dict(getattr(processor, name, None) or {}).items() if value}


def _channels(values: Any) -> list[float]:
    return [float(value) for value in (values if isinstance(values, Sequence) else [values] * 3)]


def processing(trained: Trained, inputs: Collection[str], batches: Batches, folder: Path) -> list[dict[str, Any]]:
    """The values of each distinct processor of a model, and the names of the tensors that it creates.

    Args:
        inputs: names of the tensors that the model takes.
        batches: samples on which the steps for images are compared with the output of the processor itself.
        folder: where tokenizers are saved.
    """
    parts = getattr(trained.processor, "processors", None) or getattr(trained.processor, "tokenizers", None)
    found = []
    for index, part in enumerate(parts or [trained.processor]):
        names = {name: column(name, index) for name in part.model_input_names if column(name, index) in inputs}
        if trained.wanted.task == "image":
            content = _image(part, index, batches)
        elif trained.wanted.task == "text":
            content = {"text": _text(part, index, batches, folder)}
        else:
            content = {"audio": {"sampling_rate": part.sampling_rate, "longest_seconds": batches.seconds}}
            content["processor"] = _content(part)
        found.append({"inputs": names, **content})
    return found


def _image(part: Any, index: int, batches: Batches) -> dict[str, Any]:
    """The steps, with their largest difference from the processor; left out if it exceeds one level of brightness."""
    steps = image_steps(part)
    if steps is not None:
        largest = _largest_difference(steps, column("pixel_values", index), batches)
        if largest <= 1.01 * steps["scale"] / min(steps["std"]):
            return {"image": {**steps, "largest_difference": largest}, "processor": _content(part)}
    return {"image": None, "processor": _content(part)}


def _largest_difference(steps: dict[str, Any], name: str, batches: Batches) -> float:
    """The difference between the pixels of these steps and of the processor; infinite if their numbers differ."""
    largest = 0.0
    for row in range(len(batches.rows)):
        image = open_rgb(batches.rows[row : row + 1][batches.input][0], row)
        for one in batches.alone(row):
            wanted, ours = one[name][0].numpy() if name in one else np.empty(0), prepared_image(image, steps)
            largest = max(largest, float(np.abs(ours - wanted).max()) if ours.shape == wanted.shape else np.inf)
    return largest


def _text(part: Any, index: int, batches: Batches, folder: Path) -> dict[str, Any]:
    backend, file = getattr(part, "backend_tokenizer", None), None
    if backend is not None:
        file = TOKENIZER if index == 0 else TOKENIZER.replace(".json", f"_{index}.json")
        copy = Tokenizer.from_str(backend.to_str())
        copy.enable_truncation(batches.max_length, direction=part.truncation_side)
        padding = {"pad_id": part.pad_token_id or 0, "pad_token": part.pad_token or "", "direction": part.padding_side}
        copy.enable_padding(**padding, pad_type_id=part.pad_token_type_id)
        copy.save(str(folder / file))
    return {
        "tokenizer": file,
        "longest": batches.max_length,
        "pad_token_id": part.pad_token_id,
        "padding_side": part.padding_side,
    }


def _content(part: Any) -> dict[str, Any]:
    """The settings that Transformers saves."""
    return {key: value for key, value in json.loads(part.to_json_string()).items() if key not in _NOT_TOLD}
