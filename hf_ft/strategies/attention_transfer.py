"""Attention transfer: keep the network's attention maps close to the pretrained network's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    FTConfig,
    LogRange,
    Names,
    OptionError,
    Paper,
    Plan,
    State,
    Term,
    View,
    advising,
    functional,
    option,
    register,
)
from hf_ft.core.terms import compared
from hf_ft.models import layers_of, positions, stage_outputs


@dataclass(frozen=True)
class AttentionDistance:
    """Mean squared difference between the attention maps of model and reference, summed over layers."""

    layers: Names

    def __call__(self, view: View) -> Tensor:
        called = view.states.called(self.layers)
        pairs = [(*compared(view, layer), view.token_masks.get(layer)) for layer in called]
        if all(positions(now.shape) == 1 for now, _, _ in pairs):
            raise OptionError(
                f"attention_transfer: {', '.join(self.layers)} have a single position, so all attention maps are "
                "identical. Use larger images, earlier layers (layers=...), or DELTAConfig, which compares channels."
            )
        return torch.stack([functional.attention_distance(*pair) for pair in pairs]).sum()


@register("attention_transfer")
@dataclass(frozen=True, kw_only=True)
class AttentionTransferConfig(FTConfig):
    r"""Penalise the distance of attention maps from the pretrained network's.

    .. math::
        L = \mathrm{CE} + \beta \sum_l \overline{(A_l - A_l^0)^2}, \qquad
        A_l = \frac{a_l}{\lVert a_l \rVert_2}, \; a_l = \tfrac1C \sum_c F_{l,c}^2
    """

    paper = Paper(
        "Zagoruyko, Komodakis",
        "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via "
        "Attention Transfer",
        "ICLR 2017",
        "https://arxiv.org/abs/1612.03928",
    )
    formula = "L = CE + beta * sum over layers of mean (A - A0)^2;  A = flatten(mean_c F^2), of unit length per sample"
    recommended = USUAL_RATE
    tuned = NORM_MODES | {"beta": LogRange(10.0, 1e4)}
    cost = advising.WITH_A_FROZEN_COPY + advising.DEARER  # compared at several layers
    advice = {advising.POOR_FEATURES_FEW_SAMPLES: -1, advising.VERY_FEW_SAMPLES: 1}

    beta: float = option(1000.0, "Weight of the penalty.", range="[0, inf)", source="code")
    layers: tuple[str, ...] | None = option(
        None, "Names of the modules to compare; None for the last block of each stage.", source="code"
    )

    def plan(self, model: nn.Module, state: State) -> Plan:
        layers = layers_of(model, self.layers, lambda: stage_outputs(self.anatomy(model)))
        term = Term(
            "attention_transfer",
            AttentionDistance(layers),
            weight=self.beta,
            needs=frozenset({"reference"}),
            layers=layers,
            starts_at_zero=True,
        )
        return Plan(terms=(term,) if self.beta else ())
