"""The base of a PEFT model that trains only its adapters: with these switched off, it is the model before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_ft.models.anatomy import unwrap
from hf_ft.models.example_inputs import example_inputs
from hf_ft.models.norms import batch_norms
from hf_ft.models.preserve import observing


@contextmanager
def switched_off(adapters: Sequence[nn.Module]) -> Iterator[None]:
    """Run the base alone within this context.

    Unlike ``PeftModel.disable_adapter``, it leaves ``requires_grad`` alone, which stages set.
    """
    layers: Sequence[Any] = adapters
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def adapters_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """The layers to switch off so that a model keeps computing what it computes now.

    Empty if there are none: the model is not a PEFT model, or its base is also trained or has statistics that move, or
    its adapters already change its outputs.
    """
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning or batch_norms(model):
        return ()
    layers = tuple(m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper))
    own = {id(parameter) for layer in layers for part in _parts(layer) for parameter in part.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not layers or any(id(parameter) not in own for parameter in trained):
        return ()
    return layers if not any(getattr(layer, "merged", False) for layer in layers) and _idle(model, layers) else ()


def _parts(layer: Any) -> Iterator[nn.Module]:
    names = layer.adapter_layer_names if isinstance(layer, BaseTunerLayer) else ("modules_to_save",)
    yield from (part for name in names if isinstance(part := getattr(layer, name, None), nn.Module))


def _idle(model: PeftModel, layers: Sequence[nn.Module]) -> bool:
    """Whether the adapters change nothing, as when they are new: checked on one sample, bit for bit."""
    for batch in example_inputs(unwrap(model)[0]):
        try:
            with observing(model):
                now = model(**batch).logits
                with switched_off(layers):
                    return torch.equal(now, model(**batch).logits)
        except Exception:  # inputs that do not suit the model
            continue
    return False
