"""Linear probing: train only the head, on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import FTConfig, Needs, Plan, Recommended, Stage, State, advising, register


@register("linear_probe")
@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(FTConfig):
    r"""Train only the head; the backbone, including its BatchNorm statistics, stays as pretrained.

    .. math:: L = \mathrm{CE}(h(f(x)), y), \quad f \text{ frozen, in eval mode}
    """

    formula = "L = CE(h(f(x)), y) over the head h; f is frozen, in eval mode"
    recommended = {"learning_rate": Recommended(1e-2)}
    cost = advising.HEAD_ALONE
    advice = {
        advising.GOOD_FEATURES_FEW_SAMPLES: 3,
        advising.FAIR_FEATURES: -1,
        advising.POOR_FEATURES: -3,
        advising.POOR_FEATURES_FEW_SAMPLES: -2,
        advising.SHIFTED_MEANS: -2,
        advising.OTHER_SPREADS: -1,
        advising.SAME_MEANS: 1,
        advising.FEW_SAMPLES_PER_WEIGHT: 1,
    }

    def needs(self) -> Needs:
        return Needs(several_members=True)

    def plan(self, model: nn.Module, state: State) -> Plan:
        return Plan(stages=(Stage("probe", trains=self.anatomy(model).head.modules),))
