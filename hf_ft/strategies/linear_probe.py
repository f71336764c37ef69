"""Linear probing: train only the head, on frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from hf_ft.core import (
    FITTED,
    UNSET_RATE,
    Context,
    FTConfig,
    HeadRate,
    LearningRate,
    Needs,
    Plan,
    Rate,
    Stage,
    State,
    advising,
    head_rates,
    option,
    register,
)
from hf_ft.engine.probe import check_probe, describe_head, measure_head, set_head


@register("linear_probe")
@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(FTConfig):
    r"""Train only the head; the backbone, including its BatchNorm statistics, stays as pretrained.

    .. math:: L = \mathrm{CE}(h(f(x)), y), \quad f \text{ frozen, in eval mode}
    """

    formula = "L = CE(h(f(x)), y) over the head h; f is frozen, in eval mode"
    recommended = {"learning_rate": LearningRate(FITTED)}
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

    head_lr: HeadRate = option(
        "auto",
        "Learning rate: 'auto' uses args.learning_rate if it was set, and otherwise fits one to the features; None "
        "always uses args.learning_rate.",
        range="(0, inf)",
        formerly=None,
    )
    probe_solver: Literal["sgd", "lbfgs"] = option(
        "sgd",
        "'sgd': train the head with the optimizer. 'lbfgs': fit it before training by logistic regression (L-BFGS) on "
        "the features, with the best of 50 penalties as judged on held-out samples; training then changes nothing, and "
        "one epoch is enough.",
        formerly="sgd",
    )

    def needs(self) -> Needs:
        return Needs(several_members=self.probe_solver == "sgd", sharded=True)

    def measures(self) -> bool:
        return self.probe_solver == "lbfgs" or self.head_lr == "auto"

    def with_head_rate(self, rate: float) -> LinearProbeConfig:
        return self  # a given rate is args.learning_rate

    def must_measure(self) -> bool:
        return self.probe_solver == "lbfgs"

    def measure(self, model: nn.Module, context: Context) -> State:
        if self.probe_solver == "sgd" and context.recipe.learning_rate != UNSET_RATE:
            return State()  # the rate that was set can only be meant for the head
        return measure_head(model, self, context)

    def check_state(self, model: nn.Module, state: State) -> None:
        super().check_state(model, state)
        if self.probe_solver == "lbfgs":
            check_probe(model, self, state)

    def learned(self, state: State) -> str:
        return describe_head(state)

    def plan(self, model: nn.Module, state: State) -> Plan:
        head = self.anatomy(model).head.modules
        if self.probe_solver == "sgd":
            return Plan(stages=(Stage("probe", trains=head, rates=head_rates(self, head, state)),))
        return Plan(
            surgery=(set_head(model, self, state),), stages=(Stage("probe", trains=head, rates=(Rate(head, lr=0.0),)),)
        )
