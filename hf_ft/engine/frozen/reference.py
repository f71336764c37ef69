"""The reference model: one frozen copy of the initial network, shared by all terms that compare with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.models.feature_hooks import activations
from hf_ft.models.layouts import Layouts


class Reference:
    """A frozen copy of a model, in evaluation mode.

    It is not a module, so that a module that holds it does not register it as a child: it is not trained, saved or
    wrapped for distributed training. It follows the device of the model in training.

    Args:
        model: copied in its current state and dtype.
        layouts: how its layers lay out their outputs.
    """

    def __init__(self, model: nn.Module, layouts: Layouts | None = None) -> None:
        self.layouts = layouts or Layouts()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.grad = None

    def states(self, layers: Sequence[str], batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        """The outputs of these layers, (B, T, C) or (B, C, H, W), by name; the forward pass stops at the last one."""
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        return self.layouts.arranged(activations(self.model, layers, batch))
