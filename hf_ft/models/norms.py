"""Normalisation and dropout of a model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from hf_ft.models.names import BESIDE

_DROPOUT = re.compile(r"Drop(?:out|Path|Connect)|Stoch(?:astic)?Depth")
_LAYERDROP = re.compile(r"layer_?drop(?!out)")
_NORM_CLASS = re.compile(r"(?!.*(?:Weight|Spectral)Norm).*Norm(?:Act)?(?:[123][dD])?")
_NORM_TYPES = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def norm_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All normalisation layers: by type, or leaves whose class name ends in Norm (Transformers has many)."""
    return [(name, module) for name, module in model.named_modules() if _is_norm(module)]


def batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """All batch normalisation layers with running statistics, without those of a frozen copy, which never move."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and BESIDE not in name.split(".")
    ]


def is_dropout(module: nn.Module) -> bool:
    """Whether a module randomly drops values or whole paths in training."""
    return _DROPOUT.search(type(module).__name__) is not None


def drops_layers(model: nn.Module) -> bool:
    """Whether a model skips whole layers at random in training (LayerDrop), according to its config."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    fields: dict[str, Any] = to_dict()
    nested = [value for value in fields.values() if isinstance(value, dict)]
    return any(
        isinstance(value, int | float) and value > 0
        for each in (fields, *nested)
        for name, value in each.items()
        if _LAYERDROP.search(str(name))
    )


def tensorflow_momentum(model: nn.Module) -> list[str]:
    """Names of the batch norms whose momentum was copied literally from TensorFlow's decay.

    PyTorch:    running = (1 - momentum) * running + momentum * batch
    TensorFlow: running = decay * running + (1 - decay) * batch

    Above 0.5, the running statistics are nearly those of the last batch (MobileNet 0.997, EfficientNet 0.99; PyTorch's
    default is 0.1).
    """
    return [name for name, norm in batch_norms(model) if norm.momentum is not None and norm.momentum > 0.5]


def _is_norm(module: nn.Module) -> bool:
    # Leaves only: a class called PreNorm is a whole sub-layer.
    leaf = next(module.children(), None) is None
    return isinstance(module, _NORM_TYPES) or bool(leaf and _NORM_CLASS.fullmatch(type(module).__name__))
