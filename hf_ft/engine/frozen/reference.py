"""The reference model: the network as it was at the start, one frozen copy for all terms that compare with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.models.feature_hooks import activations


class Reference:
    """A frozen copy of a model, in evaluation mode.

    It is no module, so that whatever holds it does not take it for a part of itself: it is neither trained, nor
    saved, nor wrapped for several processes. It follows the device of the model in training.

    Args:
        model: copied as it is now, in its type.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.grad = None

    def states(self, layers: Sequence[str], batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
        """The outputs of these modules, by name; what follows the last of them is not computed."""
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        return activations(self.model, layers, batch)
