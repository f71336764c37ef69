"""Layers whose outputs a term compares: the ends of the network stages, or the last feature map."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hf_ft.errors import OptionError
from hf_ft.models.anatomy import unwrap
from hf_ft.models.information_flow import last_on_the_way
from hf_ft.models.names import Names, matches
from hf_ft.models.norms import norm_layers
from hf_ft.models.parts import Anatomy
from hf_ft.models.weight_layers import is_pooling

_SHORTCUT = re.compile(r".*\.(?:downsample|shortcut)(?:\..*)?")  # sometimes defined after the main path
FLAT = 4  # number of groups into which the blocks of a network without stages are split


def layers_of(model: nn.Module, wanted: Sequence[str] | None, default: Callable[[], Names]) -> Names:
    """The named layers, or the default ones.

    Args:
        wanted: module names; in a PeftModel with or without PEFT's prefix.

    Raises:
        OptionError: if none is named, or if the model lacks one; the message lists the modules that it has.
    """
    if wanted is None:
        return default()
    modules = [name for name, _ in model.named_modules() if name]
    prefix = unwrap(model)[1]
    wanted = tuple(prefix + name if name not in modules and prefix + name in modules else name for name in wanted)
    unknown = [name for name in wanted if name not in modules]
    if unknown or not wanted:
        usual = ", ".join(default())
        raise OptionError(
            f"layers={tuple(wanted)!r}: the model has no module {', '.join(map(repr, unknown)) or '()'}. The default "
            f"would be {usual}. The modules are {', '.join(modules)}."
        )
    return wanted


def stage_outputs(found: Anatomy) -> Names:
    """The last block of every network stage. Uniform blocks without stages (ViT, BERT) are split into four groups."""
    return tuple(found.blocks[stage[-1]].modules[-1] for stage in _stages(found))


def stage_convolutions(model: nn.Module, found: Anatomy) -> Names:
    """The last convolution of every network stage; the neck counts as part of the last stage.

    If the last weight layer is not a convolution (ViT, Swin, ConvNeXt, BERT), the last block of the stage is used.
    """
    norms = {name for name, _ in norm_layers(model)}
    base_layers = {
        name: module.get_base_layer() for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    layers = []
    for number, stage in enumerate(_stages(found)):
        parts = [found.blocks[stage[-1]]] + ([found.neck] if number == len(_stages(found)) - 1 else [])
        weights = [
            (name, base_layers.get(name, module))
            for name, module in model.named_modules()
            if name not in norms
            and not any(name.startswith(f"{layer}.") for layer in base_layers)  # count an adapter and its layer once
            and not _SHORTCUT.fullmatch(name)
            and any(matches(name, part.modules) for part in parts)
            and next(base_layers.get(name, module).parameters(recurse=False), None) is not None
        ]
        block = found.blocks[stage[-1]].modules
        # A neck that is not a convolution, such as a pooler, does not take its place.
        runs = weights, [(name, module) for name, module in weights if matches(name, block)]
        last = (run[-1][0] for run in runs if run and isinstance(run[-1][1], _ConvNd))
        layers.append(next(last, block[-1]))
    return tuple(layers)


def last_feature_map(model: nn.Module, found: Anatomy, batch: Mapping[str, Any]) -> str:
    """The last module outside the head that outputs a feature map or token states and determines the logits.

    Everything that the logits reveal about the inputs passes through its output (:mod:`hf_ft.models.information_flow`):
    neither a branch next to a shortcut nor a layer whose result is unused is chosen.

    Args:
        batch: a few samples.

    Raises:
        OptionError: if no module outside the head outputs one.
    """

    def eligible(name: str, output: Tensor) -> bool:
        pools = is_pooling(model.get_submodule(name))
        return output.dim() in (3, 4) and output.is_floating_point() and not pools and not matches(name, heads)

    heads = found.head.modules
    layer = last_on_the_way(model, batch, heads, eligible)
    if layer is None:
        raise OptionError(
            f"{type(model).__name__} has no layer that outputs feature maps (B, C, H, W) or token states (B, T, C), "
            "which this strategy compares. Use L2SPConfig, which compares weights."
        )
    return layer


def positions(shape: Sequence[int]) -> int:
    """The number of positions in a feature map (B, C, H, W) or in token states (B, T, C)."""
    return shape[2] * shape[3] if len(shape) == 4 else shape[1]


def _stages(found: Anatomy) -> tuple[tuple[int, ...], ...]:
    flat = all(len(stage) == 1 for stage in found.stages) and len(found.stages) > FLAT
    if not flat:
        return found.stages
    blocks = len(found.blocks)
    ends = [round(blocks * (group + 1) / FLAT) for group in range(FLAT)]
    return tuple(tuple(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False))
