"""Which layers' outputs a term compares: the ends of a network's stages, or its last feature map."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hf_ft.errors import OptionError
from hf_ft.models.anatomy import unwrap
from hf_ft.models.names import Names, matches
from hf_ft.models.norms import norm_layers
from hf_ft.models.parts import Anatomy
from hf_ft.models.tracing import module_outputs
from hf_ft.models.weight_layers import is_pooling

_SHORTCUT = re.compile(r".*\.(?:downsample|shortcut)(?:\..*)?")  # which some define after the main path
FLAT = 4  # groups that the blocks of a network without stages are cut into


def layers_of(model: nn.Module, wanted: Sequence[str] | None, default: Callable[[], Names]) -> Names:
    """The named layers, or the default ones.

    Args:
        wanted: names of modules; those of a model in a PeftModel with or without PEFT's prefix.

    Raises:
        OptionError: none is named, or one that the model does not have; those that it has are listed.
    """
    if wanted is None:
        return default()
    known = [name for name, _ in model.named_modules() if name]
    prefix = unwrap(model)[1]
    wanted = tuple(prefix + name if name not in known and prefix + name in known else name for name in wanted)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        usual = ", ".join(default())
        raise OptionError(
            f"layers={tuple(wanted)!r}: the model has no module {', '.join(map(repr, unknown)) or '()'}. The default "
            f"would be {usual}. There are: {', '.join(known)}."
        )
    return wanted


def stage_outputs(found: Anatomy) -> Names:
    """The last block of every stage. A network whose blocks are all alike (ViT, BERT) is cut into four groups."""
    return tuple(found.blocks[stage[-1]].modules[-1] for stage in _stages(found))


def stage_convolutions(model: nn.Module, found: Anatomy) -> Names:
    """The last convolution of every stage, the neck counted with the last one.

    Where the last layer with weights is no convolution (ViT, Swin, ConvNeXt, BERT), the stage's last block.
    """
    norms = {name for name, _ in norm_layers(model)}
    adapted = {
        name: module.get_base_layer() for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    layers = []
    for number, stage in enumerate(_stages(found)):
        parts = [found.blocks[stage[-1]]] + ([found.neck] if number == len(_stages(found)) - 1 else [])
        weights = [
            (name, adapted.get(name, module))
            for name, module in model.named_modules()
            if name not in norms
            and not any(name.startswith(f"{layer}.") for layer in adapted)  # an adapter and its layer are one
            and not _SHORTCUT.fullmatch(name)
            and any(matches(name, part.modules) for part in parts)
            and next(adapted.get(name, module).parameters(recurse=False), None) is not None
        ]
        name, module = weights[-1] if weights else ("", None)
        layers.append(name if isinstance(module, _ConvNd) else found.blocks[stage[-1]].modules[-1])
    return tuple(layers)


def last_feature_map(model: nn.Module, found: Anatomy, batch: Mapping[str, Any]) -> str:
    """The module that gives the last feature map (B, C, H, W) or token states (B, T, C) before they are pooled.

    Args:
        batch: some samples, to see what modules give.

    Raises:
        OptionError: no module outside the head gives one.
    """
    maps = [
        name
        for name, shape in module_outputs(model, batch)
        if len(shape) in (3, 4) and not matches(name, found.head.modules) and not is_pooling(model.get_submodule(name))
    ]
    if not maps:
        raise OptionError(
            f"{type(model).__name__} has no layer that gives feature maps (B, C, H, W) or token states (B, T, C), "
            "which this strategy compares. Use L2SPConfig, which compares weights."
        )
    return maps[-1]


def positions(shape: Sequence[int]) -> int:
    """How many places a feature map (B, C, H, W) or token states (B, T, C) have."""
    return shape[2] * shape[3] if len(shape) == 4 else shape[1]


def _stages(found: Anatomy) -> tuple[tuple[int, ...], ...]:
    flat = all(len(stage) == 1 for stage in found.stages) and len(found.stages) > FLAT
    if not flat:
        return found.stages
    blocks = len(found.blocks)
    ends = [round(blocks * (group + 1) / FLAT) for group in range(FLAT)]
    return tuple(tuple(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False))
