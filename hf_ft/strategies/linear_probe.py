"""Linear probing: the head alone, on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core.config import FTConfig, Recommended, register
from hf_ft.core.context import State
from hf_ft.core.plan import Plan, Stage


@register("linear_probe")
@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(FTConfig):
    r"""Train the head alone; the backbone, its BatchNorm statistics too, stays as pretrained.

    .. math:: L = \mathrm{CE}(h(f(x)), y), \quad f \text{ frozen, in eval mode}
    """

    several_members = True
    formula = "L = CE(h(f(x)), y) over the head h; f is frozen, in eval mode"
    recommended = {"learning_rate": Recommended(1e-2)}

    def plan(self, model: nn.Module, state: State) -> Plan:
        return Plan(stages=(Stage("probe", trains=self.anatomy(model).head.modules),))
