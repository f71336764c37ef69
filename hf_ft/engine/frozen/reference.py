"""The reference model: the initial network, frozen, shared by all terms that compare with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.engine.frozen.base_model import adapters_of, switched_off
from hf_ft.models.border import SOURCE_LOGITS, run_to_head
from hf_ft.models.feature_hooks import Taps, activations
from hf_ft.models.layouts import Layouts
from hf_ft.models.preserve import evaluating
from hf_ft.models.source_head import attach_source_head, attached_source_head, border_head, has_source_head


class Reference:
    """A model as it is now, in evaluation mode: a frozen copy.

    For a PEFT model of which only the adapters are trained, the base without them serves: no copy is made.

    It is not a module, so that a module that holds it does not register it as a child: it is not trained, saved or
    wrapped for distributed training. It follows the device of the model in training.

    Args:
        model: in its current state and dtype.
        layouts: how its layers lay out their outputs; None for (B, T, C) or (B, C, H, W).
    """

    def __init__(self, model: nn.Module, layouts: Layouts | None = None) -> None:
        self.layouts = layouts or Layouts()
        self.adapters = adapters_of(model)
        if self.adapters:
            self.model = model
            return
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.grad = None
        if has_source_head(model):  # the same one: a resumed run compares with that of its checkpoint
            attach_source_head(self.model, attached_source_head(model))

    def states(self, layers: Sequence[str], batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        """The outputs of these layers, (B, T, C) or (B, C, H, W), by name, and source logits.

        The forward pass stops at the last of them.
        """
        if self.adapters:
            with switched_off(self.adapters):
                return self._states(layers, batch, device)
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        return self._states(layers, batch, device)

    def _states(self, layers: Sequence[str], batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        if SOURCE_LOGITS not in layers:
            return self.layouts.arranged(activations(self.model, layers, batch))
        others = [layer for layer in layers if layer != SOURCE_LOGITS]
        with evaluating(self.model), torch.no_grad():
            with Taps(self.model, others) as taps:
                border = run_to_head(self.model, border_head(self.model), batch)
            logits = attached_source_head(self.model).to(device)(border)
        inside = [layer for layer in others if layer not in taps.states]  # in the head
        states = taps.states | (activations(self.model, inside, batch) if inside else {})
        return {**self.layouts.arranged(states), SOURCE_LOGITS: logits}
