"""LP-FT: linear probing first, then full fine-tuning from the probe's head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

from hf_ft.core import (
    NORM_MODES,
    Context,
    FittedRate,
    FTConfig,
    HeadRate,
    LearningRate,
    Needs,
    NormMode,
    Paper,
    Plan,
    Stage,
    State,
    advising,
    head_rates,
    option,
    register,
)
from hf_ft.engine.probe import check_probe, describe_head, measure_head, set_head


@register("lp_ft")
@dataclass(frozen=True, kw_only=True)
class LPFTConfig(FTConfig):
    r"""Train the head to convergence on frozen features, then everything, starting from that head.

    A random head propagates large, meaningless gradients into the backbone and distorts its features; a trained head
    does not.

    .. math::
        \text{probe: } \min_h \mathrm{CE}(h(f_0(x)), y) \qquad \text{finetune: } \min_{h, f} \mathrm{CE}(h(f(x)), y)
    """

    paper = Paper(
        "Kumar, Raghunathan, Jones, Ma, Liang",
        "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
        "ICLR 2022",
        "https://arxiv.org/abs/2202.10054",
    )
    formula = "probe: min_h CE(h(f0(x)), y);  finetune: min_{h,f} CE(h(f(x)), y) from the probe's h"
    recommended = {"learning_rate": LearningRate(1e-4, sgd=3e-4, without_batch_norm=0.1)}
    tuned = {"head_lr": FittedRate(), **NORM_MODES}
    cost = advising.PART_OF_THE_RUN
    advice = {
        advising.GOOD_FEATURES_FEW_SAMPLES: 3,
        advising.GOOD_FEATURES: 2,
        advising.FAIR_FEATURES: 1,
        advising.POOR_FEATURES: -1,
        advising.SHIFTED_MEANS: -1,
        advising.SAME_MEANS: 1,
    }

    probe: float = option(0.5, "Fraction of the optimizer steps spent on the probe.", range="(0, 1)")
    head_lr: HeadRate = option(
        "auto",
        "Learning rate of the head during the probe: 'auto' to fit it to the features, None to use args.learning_rate.",
        range="(0, inf)",
    )
    norm_mode: NormMode = option(
        "eval",
        "Mode of the normalisation layers: 'eval' keeps their statistics fixed, 'auto' updates those of layers that "
        "train, 'train' those of all, even during the probe.",
        source="code",
    )
    probe_solver: Literal["sgd", "lbfgs"] = option(
        "sgd",
        "'sgd': train the head with the optimizer. 'lbfgs': fit it before training by logistic regression (L-BFGS) on "
        "the features, with the best of 50 penalties as judged on held-out samples, as the authors do; the run then "
        "consists of fine-tuning alone, and `probe` and `head_lr` are ignored.",
        formerly="sgd",
    )
    dropout: bool = option(
        False, "Whether dropout is active; the authors train in evaluation mode.", source="code", formerly=True
    )
    fresh_optimizer: bool = option(
        True, "Start the second stage without the momentum of the first.", source="code", formerly=False
    )

    def needs(self) -> Needs:
        return Needs(several_members=self.probe_solver == "sgd", sharded=True)

    def measures(self) -> bool:
        return self.probe_solver == "lbfgs" or self.head_lr == "auto"

    def must_measure(self) -> bool:
        return self.probe_solver == "lbfgs"

    def measure(self, model: nn.Module, context: Context) -> State:
        return measure_head(model, self, context)

    def check_state(self, model: nn.Module, state: State) -> None:
        super().check_state(model, state)
        if self.probe_solver == "lbfgs":
            check_probe(model, self, state)

    def learned(self, state: State) -> str:
        return describe_head(state)

    def plan(self, model: nn.Module, state: State) -> Plan:
        finetune = Stage(
            "finetune", norm_mode=self.norm_mode, dropout=self.dropout, fresh_optimizer=self.fresh_optimizer
        )
        if self.probe_solver == "lbfgs":
            return Plan(surgery=(set_head(model, self, state),), stages=(finetune,))
        head = self.anatomy(model).head.modules
        rates = head_rates(self, head, state)
        probe = Stage("probe", trains=head, duration=self.probe, rates=rates, dropout=self.dropout)
        return Plan(stages=(probe, dataclasses.replace(finetune, duration=1 - self.probe)))
