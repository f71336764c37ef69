"""EMA: an exponential moving average of the weights over the steps, as the model that is evaluated and saved."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    Average,
    Choice,
    FTConfig,
    Needs,
    Paper,
    Plan,
    State,
    advising,
    option,
    register,
)


@dataclass(frozen=True)
class WarmDecay:
    r"""Decay of an exponential moving average that grows with the number of steps: :math:`\min(d, (1 + t)/(10 + t))`.

    Attributes:
        decay: :math:`d`, its limit.

    Reference: num_updates of TensorFlow's ``tf.train.ExponentialMovingAverage``.
    """

    decay: float

    def __call__(self, steps: int) -> float:
        return min(self.decay, (1 + steps) / (10 + steps))


@register("ema")
@dataclass(frozen=True, kw_only=True)
class EMAConfig(FTConfig):
    r"""Evaluate and save an exponential moving average of the weights in place of the last ones.

    .. math::
        \bar w \leftarrow d_t \, \bar w + (1 - d_t) \, w, \qquad d_t = \min\Bigl(d, \frac{1 + t}{10 + t}\Bigr)

    after each optimizer step, where :math:`t` is the number of steps before it and :math:`d` is ``decay``. Training
    itself is unchanged.
    """

    paper = Paper(
        "Polyak, Juditsky",
        "Acceleration of Stochastic Approximation by Averaging",
        "SIAM Journal on Control and Optimization 1992",
        "https://doi.org/10.1137/0330046",
        "the average over all steps; the exponential one, with its warm-up, is TensorFlow's and timm's",
    )
    formula = "w_avg = d_t w_avg + (1 - d_t) w after each step, d_t = min(d, (1 + t) / (10 + t))"
    recommended = USUAL_RATE
    averages = True
    tuned = NORM_MODES | {"decay": Choice((0.5, 0.9, 0.99))}
    cost = advising.EVERYTHING + advising.DEARER / 2

    decay: float = option(
        0.99,
        "Limit of the decay: the average reaches back over about 1 / (1 - decay) steps. It applies from step "
        "9 / (1 - decay) - 10 on; before that, the average reaches back over a ninth of the steps.",
        range="[0, 1)",
    )

    def needs(self) -> Needs:
        return Needs(several_members=True)

    def plan(self, model: nn.Module, state: State) -> Plan:
        return Plan(average=Average(WarmDecay(self.decay)))
