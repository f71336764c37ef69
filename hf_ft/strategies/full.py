"""Full fine-tuning: train every parameter from the first step to the last."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    FTConfig,
    Needs,
    NormMode,
    Plan,
    State,
    advising,
    head_rates,
    option,
    register,
)

BASELINE_ALWAYS = advising.Rule((("samples", ">=", 0),), "the baseline of every comparison ({samples:.0f} samples)")
KEEP_STATISTICS = advising.Rule(
    (("batch_norm_layers", ">=", 1),),
    "with the statistics of its {batch_norm_layers:.0f} BatchNorm layers kept (--full.norm_mode eval), it was better "
    "on five of six tasks: try that too",
    "docs/results.md",
)


@register("full")
@dataclass(frozen=True, kw_only=True)
class FullConfig(FTConfig):
    r"""Train all parameters on the task's loss: the baseline of every comparison.

    .. math:: L = \mathrm{CE}(h(f(x)), y)
    """

    formula = "L = CE(h(f(x)), y) over all parameters"
    recommended = USUAL_RATE
    tuned = NORM_MODES
    cost = advising.EVERYTHING
    advice = {
        BASELINE_ALWAYS: 1,
        advising.GOOD_FEATURES: 1,
        advising.FAIR_FEATURES: 1,
        advising.POOR_FEATURES: 3,
        advising.POOR_FEATURES_FEW_SAMPLES: 1,
        advising.SHIFTED_MEANS: 2,
        advising.OTHER_SPREADS: 1,
        advising.NO_PART_STANDS_OUT: 1,
        advising.LOW_GRADIENT: 1,
        KEEP_STATISTICS: 0,
    }

    head_lr: float | None = option(
        None,
        "Learning rate of the head; None to use that of the backbone, args.learning_rate.",
        range="(0, inf)",
    )
    norm_mode: NormMode = option(
        "auto",
        "'eval' keeps the statistics of normalisation layers at their pretrained values; 'auto' updates those of "
        "layers that train, 'train' those of all.",
    )

    def needs(self) -> Needs:
        return Needs(several_members=True, sharded=True)

    def plan(self, model: nn.Module, state: State) -> Plan:
        if self.head_lr is None:
            return Plan()  # a plan without stages trains everything in one stage
        return Plan(rates=head_rates(self, self.anatomy(model).head.modules, state))
