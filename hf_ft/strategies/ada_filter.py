"""AdaFilter: for each sample, a recurrent network decides which filters are fine-tuned and which pretrained ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import TrainingArguments

from hf_ft.core import (
    Choice,
    FTConfig,
    LogRange,
    Paper,
    Plan,
    Rate,
    Recommended,
    Stage,
    State,
    advising,
    option,
    register,
)
from hf_ft.models.gated.model import AddPaths, check_not_computed_again, check_plain
from hf_ft.models.gated.paths import GATE
from hf_ft.models.gated.per_filter import PerFilter


@register("ada_filter")
@dataclass(frozen=True, kw_only=True)
class AdaFilterConfig(FTConfig):
    r"""Decide for each sample and filter whether the fine-tuned or the pretrained filter computes it.

    Layer :math:`l` has its pretrained filters :math:`F_l`, which stay, and a copy :math:`\tilde F_l`, which trains:

    .. math::
        x_l = G_l \odot \tilde F_l(x_{l-1}) + (1 - G_l) \odot F_l(x_{l-1}), \qquad
        G_l = \mathbb 1[\sigma(O_l h_l) > \tfrac12], \qquad
        h_l = \mathrm{LSTM}(E_l \, \bar x_{l-1}, h_{l-1})

    with the mean :math:`\bar x` of each channel over positions, and a :math:`G_l` for each channel of the output. Its
    gradient is that of the sigmoid.
    """

    paper = Paper(
        "Guo, Li, Wang, Rosing",
        "AdaFilter: Adaptive Filter Fine-Tuning for Deep Transfer Learning",
        "AAAI 2020",
        "https://arxiv.org/abs/1911.09659",
    )
    formula = "x_l = G_l F~_l(x_{l-1}) + (1 - G_l) F_l(x_{l-1}), G_l in {0, 1} per channel by an LSTM over the layers"
    recommended = {"learning_rate": Recommended(3e-4, sgd=3e-3)}
    tuned = {"gate_lr": LogRange(1e-4, 1e-2), "gate_width": Choice((32, 64, 128))}
    cost = advising.WITH_A_FROZEN_COPY + advising.DEARER
    advice = {advising.GOOD_FEATURES_FEW_SAMPLES: 1, advising.POOR_FEATURES: -1}
    plain = False

    gate_lr: float | None = option(
        None, "Learning rate of the recurrent network; None to use that of the backbone.", range="(0, inf)"
    )
    gate_width: int = option(64, "Number of units of the recurrent network.", range="[1, inf)")
    head_lr: float | None = option(
        None, "Learning rate of the head; None to use that of the backbone, args.learning_rate.", range="(0, inf)"
    )

    def check_arguments(self, args: TrainingArguments) -> None:
        check_not_computed_again(args)

    def check_model(self, model: nn.Module) -> None:
        check_plain(model)
        self._gate(model).fitted(model)

    def plan(self, model: nn.Module, state: State) -> Plan:
        wanted = ((self.gate_lr, (GATE,)), (self.head_lr, self.anatomy(model).head.modules))
        rates = tuple(Rate(names, lr=lr) for lr, names in wanted if lr is not None)
        return Plan(surgery=(AddPaths(self._gate(model)),), stages=(Stage("train", rates=rates),))

    def _gate(self, model: nn.Module) -> PerFilter:
        return PerFilter(tuple(block.modules for block in self.anatomy(model).blocks), self.gate_width)
