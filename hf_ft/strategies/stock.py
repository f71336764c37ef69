"""Full fine-tuning as the Trainer of Transformers does it when no argument is set."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import FTConfig, LearningRate, Needs, Plan, Recommended, Stage, State, advising, register


def linear_decay(progress: float) -> float:
    """The Trainer's default schedule, without a warm-up."""
    return 1 - progress


@register("stock")
@dataclass(frozen=True, kw_only=True)
class StockConfig(FTConfig):
    r"""Train all parameters with the default arguments of Transformers' Trainer: what most people run first.

    .. math:: L = \mathrm{CE}(h(f(x)), y)

    with AdamW at a learning rate of :math:`5 \cdot 10^{-5}` that decays linearly, and no weight decay.
    """

    formula = "L = CE(h(f(x)), y) over all parameters, with AdamW at 5e-5"
    recommended = {
        "learning_rate": LearningRate(5e-5, "code"),
        "optim": Recommended("adamw_torch", "code"),
        "lr_scheduler_type": Recommended("linear", "code"),
        "weight_decay": Recommended(0.0, "code"),
    }
    cost = advising.EVERYTHING

    def needs(self) -> Needs:
        return Needs(several_members=True)

    def plan(self, model: nn.Module, state: State) -> Plan:
        # A comparison gives all strategies one schedule and warm-up; this one stands for the Trainer's.
        return Plan(stages=(Stage("train", schedule=linear_decay),))
