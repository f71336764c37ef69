"""DELTA: keep feature maps close to the pretrained network's, weighted by the importance of each channel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    Context,
    FTConfig,
    LogRange,
    Names,
    OptionError,
    Paper,
    Plan,
    SquaredNorm,
    State,
    Term,
    View,
    advising,
    check_tensor,
    functional,
    option,
    register,
)
from hf_ft.core.terms import compared
from hf_ft.models import layers_of, stage_convolutions
from hf_ft.strategies.delta.channel_weights import channel_weights

AUTHORS_BATCH = 64  # their alpha multiplies a sum over this many samples


@dataclass(frozen=True)
class FeatureDistance:
    """Half the weighted squared distance between the feature maps of model and reference, summed over layers.

    A sum over the batch is divided by the authors' batch size, so that it equals the mean for that size.
    """

    layers: Names
    reduction: Literal["mean", "sum"]
    per_position: bool = True
    # C a_c of each layer. Excluded from comparison: the truth value of a tensor is ambiguous.
    weights: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, view: View) -> Tensor:
        distances = []
        for layer in view.states.called(self.layers):
            now, before = compared(view, layer)
            if layer in self.weights and self.weights[layer].device != now.device:
                self.weights[layer] = self.weights[layer].to(now.device)
            weights, mask = self.weights.get(layer), view.token_masks.get(layer)
            distances.append(
                functional.feature_distance(now, before, weights, mask, self.reduction, per_position=self.per_position)
            )
        return torch.stack(distances).sum() / (2 * AUTHORS_BATCH if self.reduction == "sum" else 2)


@register("delta")
@dataclass(frozen=True, kw_only=True)
class DELTAConfig(FTConfig):
    r"""Penalise the distance of feature maps from the pretrained network's, weighted by channel importance.

    .. math::
        L = \mathrm{CE} + \frac{\alpha}{2} \sum_l \sum_c C_l \, a_{lc}
            \frac{\lVert F_{lc} - F^0_{lc} \rVert^2}{hw} + \frac{\beta}{2} \lVert w_{\text{head}} \rVert^2,
        \qquad a_l = \operatorname{softmax}(z_l / 5)

    :math:`z_{lc}` is the increase of the loss when channel :math:`c` is set to zero, standardised within the layer.
    """

    paper = Paper(
        "Li, Xiong, Wang, Rao, Liu, Chen, Huan",
        "DELTA: Deep Learning Transfer using Feature Map with Attention for Convolutional Networks",
        "ICLR 2019",
        "https://arxiv.org/abs/1901.09229",
    )
    formula = (
        "L = CE + alpha/2 sum_layers sum_c C a_c ||F_c - F0_c||^2 / (h w) + beta/2 ||w_head||^2;  a = softmax(z/5), "
        "z_c = standardised growth of the loss without channel c"
    )
    recommended = USUAL_RATE
    tuned = NORM_MODES | {"alpha": LogRange(1e-2, 1e1)}  # the authors' two values are 0.64 and 6.4
    cost = advising.WITH_A_TRAINING_BEFORE
    advice = {advising.POOR_FEATURES_FEW_SAMPLES: -1, advising.VERY_FEW_SAMPLES: 1}

    alpha: float = option(
        0.64,
        "Weight of the distance between feature maps. The authors' 0.01 multiplies a sum over 64 samples; on Stanford "
        "Dogs they use ten times as much.",
        range="[0, inf)",
        source="code",
    )
    beta: float = option(0.01, "Weight of the squared norm of the head.", range="[0, inf)", source="code")
    weights: Literal["attention", "uniform", "feature_map"] = option(
        "attention",
        "'attention' weights channels by how much the loss grows without them; 'uniform' (ours) weights them equally, "
        "a_c = 1/C. 'feature_map' is the authors' plain regulariser: equal weights, and a sum over positions in place "
        "of the mean, so that large maps count more.",
        source="code",
    )
    reduction: Literal["mean", "sum"] = option(
        "mean",
        "Reduction over the batch. 'sum', as in the authors' code, makes the effective alpha grow with the batch size; "
        "the two agree for 64 samples.",
    )
    layers: tuple[str, ...] | None = option(
        None, "Names of the modules to compare; None for the last convolution of each stage.", source="code"
    )
    batches: int = option(4, "Number of batches used to weight the channels.", range="[1, inf)", source="code")
    head_epochs: int = option(
        5, "Epochs of training the head alone before the channels are weighted.", range="[1, inf)"
    )
    head_lr: float = option(1e-2, "Learning rate of the head in these epochs.", range="(0, inf)")

    def check_model(self, model: nn.Module) -> None:
        self._layers(model)

    def measures(self) -> bool:
        return self.weights == "attention" and self.alpha > 0

    def measure(self, model: nn.Module, context: Context) -> State:
        layers = self._layers(model)
        weights = channel_weights(
            model, layers, self, context, epochs=self.head_epochs, lr=self.head_lr, batches=self.batches
        )
        return State(tensors=weights)

    def check_state(self, model: nn.Module, state: State) -> None:
        super().check_state(model, state)
        for layer in self._layers(model) if self.measures() else ():
            if layer in state.tensors:
                channels = getattr(model.get_submodule(layer), "out_channels", len(state.tensors[layer]))
                check_tensor(layer, state.tensors[layer], (channels,), least=0, most=1)

    def plan(self, model: nn.Module, state: State) -> Plan:
        head, layers = self.anatomy(model).head.modules, self._layers(model)
        distance = Term(
            "delta",
            FeatureDistance(layers, self.reduction, self.weights != "feature_map", self._weights(layers, state)),
            weight=self.alpha,
            needs=frozenset({"reference"}),
            layers=layers,
            couples_batch=self.reduction == "sum",
            starts_at_zero=True,
        )
        norm = Term("delta_head", SquaredNorm(head), weight=self.beta, replaces_decay=head)
        return Plan(terms=tuple(term for term in (distance, norm) if term.weight))

    def learned(self, state: State) -> str:
        if not state.tensors:
            return ""
        shares = ", ".join(f"`{name}` {float(a.max()) * len(a):.1f}" for name, a in state.tensors.items())
        return f"Largest channel weight of each layer, relative to the mean: {shares}."

    def _layers(self, model: nn.Module) -> Names:
        return layers_of(model, self.layers, lambda: stage_convolutions(model, self.anatomy(model)))

    def _weights(self, layers: Names, state: State) -> dict[str, Tensor]:
        if not self.measures():
            return {}
        missing = [layer for layer in layers if layer not in state.tensors]
        if missing:
            raise OptionError(
                f"delta: no weights were measured for layer {missing[0]!r}. Measure first (pass a context to set_up), "
                "or set weights='uniform'."
            )
        return {layer: state.tensors[layer] * len(state.tensors[layer]) for layer in layers}
