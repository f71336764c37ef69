"""Linear probing: the head alone, on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core.advising import (
    FAIR_FEATURES,
    FEW_SAMPLES_PER_WEIGHT,
    GOOD_FEATURES_FEW_SAMPLES,
    HEAD_ALONE,
    OTHER_SPREADS,
    POOR_FEATURES,
    POOR_FEATURES_FEW_SAMPLES,
    SAME_MEANS,
    SHIFTED_MEANS,
)
from hf_ft.core.config import FTConfig, Recommended, register
from hf_ft.core.context import State
from hf_ft.core.needs import Needs
from hf_ft.core.plan import Plan, Stage


@register("linear_probe")
@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(FTConfig):
    r"""Train the head alone; the backbone, its BatchNorm statistics too, stays as pretrained.

    .. math:: L = \mathrm{CE}(h(f(x)), y), \quad f \text{ frozen, in eval mode}
    """

    formula = "L = CE(h(f(x)), y) over the head h; f is frozen, in eval mode"
    recommended = {"learning_rate": Recommended(1e-2)}
    cost = HEAD_ALONE
    advice = {
        GOOD_FEATURES_FEW_SAMPLES: 3,
        FAIR_FEATURES: -1,
        POOR_FEATURES: -3,
        POOR_FEATURES_FEW_SAMPLES: -2,
        SHIFTED_MEANS: -2,
        OTHER_SPREADS: -1,
        SAME_MEANS: 1,
        FEW_SAMPLES_PER_WEIGHT: 1,
    }

    def needs(self) -> Needs:
        return Needs(several_members=True)

    def plan(self, model: nn.Module, state: State) -> Plan:
        return Plan(stages=(Stage("probe", trains=self.anatomy(model).head.modules),))
