"""Layer-wise learning-rate decay: train all parameters, lower layers more slowly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import Choice, FTConfig, LearningRate, Needs, Paper, Plan, Rate, State, advising, option, register


@register("layer_decay")
@dataclass(frozen=True, kw_only=True)
class LayerDecayConfig(FTConfig):
    r"""Train everything, with learning rates that decay geometrically from the head to the stem.

    For parts numbered from :math:`0` (stem) to :math:`L` (head):

    .. math:: \eta_l = \eta \, d^{\,L - l}

    where :math:`d` is ``decay``.
    """

    paper = Paper(
        "Clark, Luong, Le, Manning",
        "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators",
        "ICLR 2020",
        "https://arxiv.org/abs/2003.10555",
    )
    formula = "lr_l = lr * decay^(L - l), parts l = 0 (stem) ... L (head)"
    recommended = {"learning_rate": LearningRate(1e-3, sgd=1e-2, without_batch_norm=0.1)}
    tuned = {"decay": Choice((0.65, 0.8, 0.9))}
    cost = advising.EVERYTHING + advising.DEARER  # many parameter groups
    advice = {
        advising.GOOD_FEATURES: 1,
        advising.FAIR_FEATURES: 1,
        advising.POOR_FEATURES: 2,
        advising.LOW_GRADIENT: -1,
        advising.HIGH_GRADIENT: 1,
    }

    decay: float = option(
        0.8, "Ratio of the learning rates of neighbouring parts (0.8 in ELECTRA).", range="(0, 1]", source="paper"
    )

    def needs(self) -> Needs:
        return Needs(sharded=True)

    def plan(self, model: nn.Module, state: State) -> Plan:
        *others, _ = self.anatomy(model).parts  # the last one, the head, trains at the full rate
        scales = (self.decay ** (len(others) - i) for i in range(len(others)))
        return Plan(rates=tuple(Rate(part.modules, scale=s) for part, s in zip(others, scales, strict=True)))
