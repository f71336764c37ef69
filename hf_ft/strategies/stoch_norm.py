"""Stochastic normalisation: BatchNorm that mixes batch and moving statistics, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import (
    USUAL_RATE,
    FTConfig,
    LogRange,
    Needs,
    OptionError,
    Paper,
    Plan,
    State,
    advising,
    head_rates,
    option,
    register,
)
from hf_ft.models.stoch_norm import AddStochNorm, convertible, remove_stoch_norm

NO_BATCH_NORM = advising.Rule(
    (("batch_norm_layers", "<", 1),),
    "it changes BatchNorm layers, and the model has none ({batch_norm_layers:.0f} layers)",
    "",
)


@register("stoch_norm")
@dataclass(frozen=True, kw_only=True)
class StochNormConfig(FTConfig):
    r"""Normalise each channel with the batch's statistics or with the moving ones, at random in every step.

    For channel :math:`c` of a BatchNorm layer in training,

    .. math::
        \hat x_c = s_c \frac{x_c - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}
        + (1 - s_c) \frac{x_c - \tilde\mu_c}{\sqrt{\tilde\sigma_c^2 + \epsilon}}, \qquad s_c \sim \mathrm{Bernoulli}(p)

    with the batch's mean and variance :math:`\mu, \sigma^2` and the moving ones :math:`\tilde\mu, \tilde\sigma^2`,
    which start at the pretrained values and are updated as usual. In evaluation it is plain BatchNorm, as is the saved
    model.
    """

    paper = Paper(
        "Kou, You, Long, Wang",
        "Stochastic Normalization",
        "NeurIPS 2020",
        "https://papers.nips.cc/paper/2020/hash/bc573864331a9e42e4511de6f678aa83-Abstract.html",
    )
    formula = "x_c is normalised with its batch's statistics with probability p, else with the moving ones"
    recommended = USUAL_RATE
    tuned = {"p": LogRange(0.1, 1.0)}
    cost = advising.EVERYTHING + advising.DEARER
    advice = {advising.VERY_FEW_SAMPLES: 1, NO_BATCH_NORM: None}

    p: float = option(
        0.5, "Probability that a channel is normalised with its batch's statistics.", range="[0, 1]", source="code"
    )
    head_lr: float | None = option(
        None, "Learning rate of the head; None to use that of the backbone, args.learning_rate.", range="(0, inf)"
    )

    def needs(self) -> Needs:
        return Needs(several_members=True)

    def needs_batch_statistics(self) -> bool:
        return True

    def adapted(self, model: nn.Module) -> FTConfig | None:
        return self if convertible(model) else None

    def plan(self, model: nn.Module, state: State) -> Plan:
        if not convertible(model):
            raise OptionError(
                "stoch_norm: the model has no BatchNorm layers of torch's own kinds, which is what it changes. Use "
                "FullConfig, or BSSConfig by the same authors."
            )
        head = self.anatomy(model).head.modules
        return Plan(surgery=(AddStochNorm(self.p),), rates=head_rates(self, head, state), finalise=(remove_stoch_norm,))
