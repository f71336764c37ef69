"""Loss terms shared by several strategies, as functions of a :class:`~hf_ft.core.view.View`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_ft.core.view import View
from hf_ft.errors import OptionError
from hf_ft.functional import l2_sp
from hf_ft.models.names import Names


@dataclass(frozen=True)
class DistanceFromStart:
    """Half the squared distance of the named parameters from their initial values."""

    names: Names

    def __call__(self, view: View) -> Tensor:
        return view.summed(l2_sp(view.weights(self.names), view.starts(self.names)))


@dataclass(frozen=True)
class SquaredNorm:
    """Half the squared norm of the named parameters."""

    names: Names

    def __call__(self, view: View) -> Tensor:
        return view.summed(l2_sp(view.weights(self.names)))


def compared(view: View, layer: str) -> tuple[Tensor, Tensor]:
    """The states of a layer in the model and in the reference, (B, C, H, W) or (B, T, C).

    Raises:
        OptionError: if the layer's output has another shape.
    """
    state = view.states[layer]
    if state.dim() not in (3, 4):
        raise OptionError(
            f"layer {layer!r} outputs {tuple(state.shape)}, but only feature maps (B, C, H, W) and token states (B, T, "
            "C) can be compared. Name layers before the pooling (layers=...), or compare weights with L2SPConfig."
        )
    return state, view.reference[layer]
