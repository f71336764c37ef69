"""TRED's disentangler: splits a frozen network's features F into a target-relevant part P and the remainder N.

For its training see :mod:`hf_ft.strategies.tred.train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from hf_ft.core import LARGEST, OptionError, check_tensor
from hf_ft.functional import as_positions, wide

Kind = Literal["branches", "mask"]
# A gate below this passes at most 1/400 of a channel's energy, but a probe that rescales channels could still read it.
CLOSED = 0.05
SMALLEST = torch.finfo(torch.float32).tiny


class Disentangler(nn.Module):
    """Computes (P, N) for features of either layout, in float32 or higher precision and in the units of F.

    ``scale`` is the root mean square of F; :meth:`split` receives F divided by it, so that initialisation, learning
    rates and weights mean the same for every network. ``non_negative``: F has no negative values, nor will P and N.
    """

    scale: Tensor

    def __init__(self, channels: int, non_negative: bool) -> None:
        super().__init__()
        self.channels, self.non_negative = channels, non_negative
        self.register_buffer("scale", torch.ones(()))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """P and N in the shape of ``features``; 0 at padded tokens, where the (B, T) ``mask`` is 0.

        Raises:
            ValueError: if the number of channels does not match.
        """
        # In half precision, as under autocast, P and N would not add up to F.
        with torch.autocast(features.device.type, enabled=False):
            positions = as_positions(wide(features)) / self.scale
            if positions.shape[-1] != self.channels:
                raise ValueError(
                    f"the disentangler is for {self.channels} channels, but the features {tuple(features.shape)} have "
                    f"{positions.shape[-1]}: use one for the same layer of the same architecture."
                )
            if mask is not None and self.training:  # BatchNorm must not see padding
                valid = valid_positions(positions, mask)
                parts = [_scattered(part, valid) for part in self.split(positions[valid])]
            else:  # no row selection, which would synchronise the GPU
                parts = [part.reshape(positions.shape) for part in self.split(positions.flatten(0, 1))]
                parts = parts if mask is None else [part * mask.to(part)[..., None] for part in parts]
            p, n = (_laid_out(part * self.scale, features) for part in parts)
            return p, n

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Split rows (positions, C) into P and N."""
        raise NotImplementedError

    def start(self, mean: Tensor, covariance: Tensor) -> None:
        """Initialise from the features' mean and covariance over all positions."""

    def settle(self, mean: Tensor, covariance: Tensor) -> None:
        """Finalise after training, with the same mean and covariance."""


class Mask(Disentangler):
    """One gate per channel, m = sigmoid(a): P = m F and N = F - P.

    Gates start at 1/2. After training, nearly closed gates are closed completely.
    """

    def __init__(self, channels: int, non_negative: bool = True) -> None:
        super().__init__(channels, non_negative)
        self.logits = nn.Parameter(torch.zeros(channels))

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        p = self.logits.sigmoid() * rows
        return p, rows - p

    @torch.no_grad()
    def settle(self, mean: Tensor, covariance: Tensor) -> None:
        self.logits[self.logits.sigmoid() < CLOSED] = -torch.inf


class Branches(Disentangler):
    """P and N, each by 1x1 convolution, BatchNorm and ReLU; no ReLU if F has negative values. Both start as F / 2."""

    def __init__(self, channels: int, non_negative: bool = True) -> None:
        super().__init__(channels, non_negative)
        self.p, self.n = _Branch(channels), _Branch(channels)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        p, n = self.p(rows), self.n(rows)
        return (p.relu(), n.relu()) if self.non_negative else (p, n)

    def start(self, mean: Tensor, covariance: Tensor) -> None:
        for branch in (self.p, self.n):
            branch.measure(mean, covariance)
            branch.undo()

    def settle(self, mean: Tensor, covariance: Tensor) -> None:
        for branch in (self.p, self.n):
            branch.measure(mean, covariance)


class _Branch(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # A 1x1 convolution is linear over channels. BatchNorm would cancel its bias.
        self.mix = nn.Linear(channels, channels, bias=False)
        self.norm = nn.BatchNorm1d(channels)
        nn.init.eye_(self.mix.weight).data.div_(2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(self.mix(rows))

    @torch.no_grad()
    def measure(self, mean: Tensor, covariance: Tensor) -> None:
        """Set the norm's exact statistics, which for a linear map follow from those of F.

        After only a few training steps, running averages lag behind, and P + N would not reconstruct F.
        """
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        weight = self.mix.weight.to(covariance)
        self.norm.running_mean.copy_(weight @ mean)
        self.norm.running_var.copy_(((weight @ covariance) * weight).sum(dim=1).clamp_min(0))

    @torch.no_grad()
    def undo(self) -> None:
        """Set the affine parameters so that the norm is the identity."""
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        self.norm.bias.copy_(self.norm.running_mean)
        self.norm.weight.copy_((self.norm.running_var + self.norm.eps).sqrt())


def make_disentangler(kind: Kind, channels: int, non_negative: bool) -> Disentangler:
    """An untrained disentangler, into which a trained state can be loaded."""
    return (Branches if kind == "branches" else Mask)(channels, non_negative)


def check_disentangler(kind: Kind, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are the state of a trained disentangler of this kind.

    Raises:
        OptionError: naming the first that is not.
    """
    wanted = make_disentangler(kind, channels_of(tensors), non_negative=True).state_dict()
    if set(wanted) != set(tensors):
        raise OptionError(f"a disentangler {kind!r} consists of {', '.join(wanted)}, not of {', '.join(tensors)}.")
    for name, tensor in tensors.items():
        if name == "logits":  # of gates, which are closed at minus infinity
            tensor = tensor.clamp_min(-LARGEST)
        least = SMALLEST if name == "scale" else 0.0 if name.endswith("running_var") else -LARGEST
        check_tensor(name, tensor, wanted[name].shape, least, LARGEST)


def channels_of(tensors: Mapping[str, Tensor]) -> int:
    """The number of channels of the disentangler with this state; 0 if the state is not a disentangler's."""
    return next((tensor.shape[-1] for tensor in tensors.values() if tensor.dim()), 0)


def valid_positions(positions: Tensor, mask: Tensor | None) -> Tensor:
    """Mask (B, positions) of the positions in (B, positions, C) that are not padding."""
    if mask is None:
        return torch.ones(positions.shape[:2], dtype=torch.bool, device=positions.device)
    return mask.to(positions.device).bool()


def _scattered(rows: Tensor, valid: Tensor) -> Tensor:
    positions = rows.new_zeros(*valid.shape, rows.shape[-1])
    positions[valid] = rows
    return positions


def _laid_out(positions: Tensor, like: Tensor) -> Tensor:
    return positions.transpose(1, 2).reshape(like.shape) if like.dim() == 4 else positions
