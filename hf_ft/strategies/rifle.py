"""RIFLE: re-initialise the head at intervals, so that deep layers keep receiving large gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    Choice,
    FTConfig,
    Paper,
    Plan,
    Rate,
    Stage,
    State,
    advising,
    option,
    register,
)


@register("rifle")
@dataclass(frozen=True, kw_only=True)
class RIFLEConfig(FTConfig):
    r"""Train everything, and re-initialise the head at equal intervals.

    A run of :math:`T` steps is divided into :math:`n + 1` cycles, where :math:`n` is ``times``. At the beginning of
    each but the first,

    .. math:: h \sim \text{initialisation}, \qquad t = \frac{k T}{n + 1}, \; k = 1, \dots, n

    and the rest of the network keeps training. The last cycle ends with a trained head.
    """

    paper = Paper(
        "Li, Xiong, An, Xu, Dou",
        "RIFLE: Backpropagation in Depth for Deep Transfer Learning through Re-Initializing the Fully-connected LayEr",
        "ICML 2020",
        "https://arxiv.org/abs/2007.03349",
    )
    formula = "h is re-initialised at the steps k T / (n + 1), k = 1 ... n"
    recommended = USUAL_RATE
    tuned = NORM_MODES | {"times": Choice((1, 2, 3))}
    cost = advising.EVERYTHING + advising.DEARER / 2
    advice = {advising.GOOD_FEATURES_FEW_SAMPLES: -1, advising.POOR_FEATURES: 1}

    times: int = option(3, "Number of times the head is re-initialised.", range="[1, inf)")
    head_lr: float | None = option(
        None, "Learning rate of the head; None to use that of the backbone, args.learning_rate.", range="(0, inf)"
    )

    def plan(self, model: nn.Module, state: State) -> Plan:
        head = self.anatomy(model).head.modules
        rates = () if self.head_lr is None else (Rate(head, lr=self.head_lr),)
        cycles = self.times + 1
        return Plan(
            stages=tuple(
                Stage(f"cycle{k}", duration=1 / cycles, rates=rates, redraws=head if k else ()) for k in range(cycles)
            )
        )
