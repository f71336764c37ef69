"""Stochastic normalisation: each channel is normalised by its batch's or by the moving statistics, at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ft.models.norms import batch_norms


class StochNorm(nn.modules.batchnorm._BatchNorm):
    """The form of a BatchNorm layer while it trains; parameters, buffers and their names are kept."""

    stoch_norm_p: float

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        # Copies: the call below updates the moving statistics in place.
        moving = self.running_mean.clone(), self.running_var.clone()
        by_moving = F.batch_norm(input, *moving, self.weight, self.bias, False, 0.0, self.eps)
        by_batch = super().forward(input)
        shape = (1, self.num_features, *(1,) * (input.dim() - 2))
        chosen = torch.rand(shape, device=input.device) < self.stoch_norm_p
        return torch.where(chosen, by_batch, by_moving)


class StochNorm1d(StochNorm, nn.BatchNorm1d): ...


class StochNorm2d(StochNorm, nn.BatchNorm2d): ...


class StochNorm3d(StochNorm, nn.BatchNorm3d): ...


# Other classes may compute more than the normalisation, such as an activation.
KINDS: dict[type, type] = {nn.BatchNorm1d: StochNorm1d, nn.BatchNorm2d: StochNorm2d, nn.BatchNorm3d: StochNorm3d}


@dataclass(frozen=True)
class AddStochNorm:
    """A surgery: the BatchNorm layers of a model become stochastic.

    Attributes:
        p: probability that a channel is normalised by the statistics of its batch.
    """

    p: float

    def __call__(self, model: nn.Module) -> nn.Module:
        for _, norm in convertible(model):
            norm.stoch_norm_p, norm.__class__ = self.p, KINDS[type(norm)]
        return model


def remove_stoch_norm(model: nn.Module) -> nn.Module:
    """Make stochastic layers plain BatchNorm layers again."""
    for module in model.modules():
        if isinstance(module, StochNorm):
            module.__class__ = next(plain for plain, kind in KINDS.items() if kind is type(module))
            del module.stoch_norm_p
    return model


def convertible(model: nn.Module) -> Sequence[tuple[str, Any]]:
    """The BatchNorm layers whose forward is that of torch."""
    return [(name, norm) for name, norm in batch_norms(model) if type(norm) in KINDS]
