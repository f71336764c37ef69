"""AdaFilter: for each sample, a recurrent network decides which filters are the fine-tuned and which the pretrained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import Choice, LogRange, Paper, option, register
from hf_ft.core.gated import GatedStrategy
from hf_ft.models.gated.per_filter import PerFilter


@register("ada_filter")
@dataclass(frozen=True, kw_only=True)
class AdaFilterConfig(GatedStrategy):
    r"""Decide for each sample and filter whether the fine-tuned or the pretrained filter computes it.

    Layer :math:`l` has its pretrained filters :math:`F_l`, which stay fixed, and a copy :math:`\tilde F_l`, which
    trains:

    .. math::
        x_l = G_l \odot \tilde F_l(x_{l-1}) + (1 - G_l) \odot F_l(x_{l-1}), \qquad
        G_l = \mathbb 1[\sigma(O_l h_l) > \tfrac12], \qquad
        h_l = \mathrm{LSTM}(E_l \, \bar x_{l-1}, h_{l-1})

    where :math:`\bar x` is the mean of each channel over positions, and :math:`G_l` has one entry per output channel.
    Its gradient is that of the sigmoid.
    """

    paper = Paper(
        "Guo, Li, Wang, Rosing",
        "AdaFilter: Adaptive Filter Fine-Tuning for Deep Transfer Learning",
        "AAAI 2020",
        "https://arxiv.org/abs/1911.09659",
    )
    formula = "x_l = G_l F~_l(x_{l-1}) + (1 - G_l) F_l(x_{l-1}), G_l in {0, 1} per channel by an LSTM over the layers"
    tuned = {"gate_lr": LogRange(1e-4, 1e-2), "gate_width": Choice((32, 64, 128))}

    gate_lr: float | None = option(
        None, "Learning rate of the recurrent network; None to use that of the backbone.", range="(0, inf)"
    )
    gate_width: int = option(64, "Number of units of the recurrent network.", range="[1, inf)")
    head_lr: float | None = option(
        None, "Learning rate of the head; None to use that of the backbone, args.learning_rate.", range="(0, inf)"
    )

    def gate_rate(self) -> float | None:
        return self.gate_lr

    def gate(self, model: nn.Module) -> PerFilter:
        return PerFilter(tuple(block.modules for block in self.anatomy(model).blocks), self.gate_width)
