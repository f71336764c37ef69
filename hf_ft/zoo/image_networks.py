"""The image networks with a short name: their weights, read from installed packages, and their processors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from hf_ft.errors import CheckpointError
from hf_ft.zoo.datasets import _package_path
from hf_ft.zoo.dinov2 import dinov2_small
from hf_ft.zoo.short_names import SHORT_NAMES

DINOV2 = "dinov2-small"
GATES = ".squeeze_excite."
# EfficientNet's repeats times 1.0 / 1.1 / 1.2 and channels times 1.0 / 1.0 / 1.1, rounded as there. They are listed, as
# Lite scales neither the repeats of the first and the last stage nor the channels of the stem and the last convolution.
LITE: dict[str, dict[str, Any]] = {
    "efficientnet-lite0": {"num_block_repeats": [1, 2, 2, 3, 3, 4, 1]},
    "efficientnet-lite1": {"num_block_repeats": [1, 3, 3, 4, 4, 5, 1]},
    "efficientnet-lite2": {
        "num_block_repeats": [1, 3, 3, 4, 4, 5, 1],
        "in_channels": [32, 16, 24, 48, 88, 120, 208],
        "out_channels": [16, 24, 48, 88, 120, 208, 352],
        "dropout_rate": 0.3,
    },
}


def load_by_position(model: nn.Module, tensors: Mapping[str, Tensor], skip: str | None = None) -> int:
    """Copy tensors into a model whose state dict has the same order but other names; return the number of tensors.

    Args:
        skip: skip the model's tensors whose name contains this.

    Raises:
        CheckpointError: if the number of tensors, a shape or the last component of a name differs.
    """
    state = model.state_dict()
    names = [name for name in state if skip is None or skip not in name]
    if len(names) != len(tensors):
        raise CheckpointError(f"{len(tensors)} tensors do not match the {len(names)} of {type(model).__name__}")
    for name, (source, tensor) in zip(names, tensors.items(), strict=True):
        if name.rpartition(".")[2] != source.rpartition(".")[2] or state[name].shape != tensor.shape:
            raise CheckpointError(f"{source} {tuple(tensor.shape)} does not match {name} {tuple(state[name].shape)}")
        state[name] = tensor
    model.load_state_dict(state)
    return len(names)


def freeze_pinned_gates(model: nn.Module) -> int:
    """Freeze the squeeze-excitation gates pinned at 1, which can never learn; return the number of parameters.

    EfficientNet-Lite0 has 636,540 of them, Lite1 813,292, Lite2 955,078. Checkpoints do not store ``requires_grad``:
    call this after each load.
    """
    frozen = 0
    for name, gate in model.named_modules():
        weights = dict(gate.named_parameters()) if f"{name}.".endswith(GATES) else {}
        pins = {key: 30.0 if key == "expand.bias" else 0.0 for key in weights}
        if weights and all(bool((weights[key] == pins[key]).all()) for key in weights):
            gate.requires_grad_(False)
            frozen += sum(weight.numel() for weight in weights.values())
    return frozen


def _mobilenet_v2(path: Path, size: int) -> Any:
    options: dict[str, Any] = {"tf_padding": False, "output_stride": 32, "layer_norm_eps": 1e-5}
    options |= {"num_labels": 1000, "hidden_act": "relu6", "classifier_dropout_prob": 0.2, "image_size": size}
    model = hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(**options))
    load_by_position(model, torch.load(path, map_location="cpu", weights_only=True))
    return model


def _lite(name: str, path: Path, size: int) -> Any:
    options: dict[str, Any] = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    options |= {"num_labels": 1000, "hidden_act": "relu6", "image_size": size, "dropout_rate": 0.2}
    options |= {"batch_norm_eps": 1e-3, "batch_norm_momentum": 0.01, "drop_connect_rate": 0.2}
    config = hf.EfficientNetConfig(**(options | LITE[name]))
    config.depthwise_padding = _odd_inputs(config)
    model = hf.EfficientNetForImageClassification(config)
    load_by_position(model, torch.load(path, map_location="cpu", weights_only=True), skip=GATES)
    # Lite has no squeeze-excitation: pin every gate at sigmoid(30), which is 1 in float32, with gradient 0.
    for key, parameter in model.named_parameters():
        if GATES in key:
            nn.init.constant_(parameter, 30.0 if key.endswith("expand.bias") else 0.0)
    freeze_pinned_gates(model)
    return model


def _odd_inputs(config: hf.EfficientNetConfig) -> list[int]:
    """The blocks that halve a map of odd side: TensorFlow pads these on both sides, and all others on one."""
    size = config.image_size
    side = -(-(size if isinstance(size, int) else size[0]) // 2)
    block, odd = 0, []
    for stride, repeats in zip(config.strides, config.num_block_repeats, strict=True):
        if stride == 2:
            odd += [block] if side % 2 else []
            side = -(-side // 2)
        block += repeats
    return odd


def image_processor(name: str, size: int | None) -> Any:
    # The PIL classes need no torchvision and produce the same pixels everywhere; they are saved under the plain
    # name, so AutoImageProcessor loads them with or without torchvision.
    side = size or SHORT_NAMES[name].image_size
    options: dict[str, Any] = {"size": {"height": side, "width": side}, "do_convert_rgb": True}
    if name in LITE:
        # `include_top` would divide by the standard deviation a second time.
        options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "include_top": False, "resample": 3}
        return hf.EfficientNetImageProcessorPil(**options)
    options |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if name == DINOV2:
        return hf.BitImageProcessorPil(**options, resample=3, do_center_crop=False)
    return hf.MobileNetV2ImageProcessorPil(**options, do_center_crop=False)


def image_network(name: str, size: int | None) -> Any:
    """The network with its pretrained head.

    Raises:
        ImportError: if its package is not installed.
    """
    entry = SHORT_NAMES[name]
    path, side = _package_path(entry.requirement, entry.path), size or entry.image_size
    if name == DINOV2:
        return dinov2_small(path)
    return _lite(name, path, side) if name in LITE else _mobilenet_v2(path, side)
