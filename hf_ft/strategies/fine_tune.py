"""fastai's ``fine_tune``: one cycle for the head alone, then one for everything, lower layers at lower rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from hf_ft.core import (
    Choice,
    FTConfig,
    LearningRate,
    Names,
    Paper,
    Plan,
    Rate,
    Recommended,
    Stage,
    State,
    advising,
    option,
    register,
)
from hf_ft.models.names import covered
from hf_ft.models.norms import norm_layers
from hf_ft.models.parts import Anatomy

FROZEN_PEAK = 0.99  # the first cycle all but ends with its peak
FROZEN_DIV = 25.0
LAST_DIV = 1e5
FROZEN_RATE = 0.1  # of the norms of the body while the rest of it is frozen
SECOND_CYCLE = 0.5
MOMENTA = (0.95, 0.85, 0.95)


def cosine(start: float, end: float, u: float) -> float:
    """From start to end along half a cosine, for u in [0, 1]."""
    return start + (1 + math.cos(math.pi * (1 - u))) * (end - start) / 2


@dataclass(frozen=True)
class OneCycle:
    """From ``start`` to ``peak`` in the first ``share`` of a stage, then to ``end``, along half cosines."""

    share: float
    start: float
    peak: float
    end: float

    def __call__(self, progress: float) -> float:
        if progress < self.share:
            return cosine(self.start, self.peak, progress / self.share)
        return cosine(self.peak, self.end, (progress - self.share) / (1 - self.share))


def halves(anatomy: Anatomy) -> tuple[Names, Names]:
    """The lower and the upper half of everything but the head, divided between two of the network's stages."""
    stages = anatomy.stages
    first = {block for stage in stages[: len(stages) // 2] for block in stage}
    blocks = [(index in first, block.modules) for index, block in enumerate(anatomy.blocks)]
    lower = [anatomy.stem.modules, *(modules for inside, modules in blocks if inside)]
    upper = [*(modules for inside, modules in blocks if not inside), anatomy.neck.modules]
    return tuple(name for part in lower for name in part), tuple(name for part in upper for name in part)


def norms_of_body(model: nn.Module, head: Names) -> Names:
    """Normalisation layers with parameters, outside the head."""
    heads = set(head)
    norms = [(name, norm) for name, norm in norm_layers(model) if not covered(name, heads)]
    return tuple(name for name, norm in norms if next(norm.parameters(), None) is not None)


def one_cycle(name: str, trains: Names, rates: tuple[Rate, ...], share: float, div: float, duration: float) -> Stage:
    """A stage whose rates rise from 1 / div of their peak and end near 0, while the momentum does the opposite."""
    return Stage(
        name,
        trains=trains,
        duration=duration,
        rates=rates,
        fresh_optimizer=True,
        schedule=OneCycle(share, 1 / div, 1.0, 1 / LAST_DIV),
        momentum=OneCycle(share, *MOMENTA),
    )


@register("fine_tune")
@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(FTConfig):
    r"""Train the head for one cycle, then everything for another, with lower rates in lower layers, as fastai does.

    At progress :math:`u` of a cycle whose rate peaks at :math:`p`, the rate is

    .. math::
        \eta(u) = \begin{cases} c(\eta_{\max} / d, \eta_{\max}, u / p) & u < p \\
        c(\eta_{\max}, 10^{-5} \eta_{\max}, \frac{u - p}{1 - p}) & \text{otherwise} \end{cases},
        \qquad c(a, b, v) = a + \frac{1 - \cos \pi v}{2} (b - a)

    and the momentum moves from 0.95 to 0.85 and back. In the first cycle, :math:`\eta_{\max} = \eta` for the head. In
    the second it is :math:`\eta / 2` for the head and, with :math:`m` = ``lr_mult``, :math:`\eta / (2 \sqrt m)` and
    :math:`\eta / (2 m)` for the upper and the lower half of the body.
    """

    paper = Paper(
        "Howard, Gugger",
        "fastai: A Layered API for Deep Learning",
        "Information 11(2), 2020",
        "https://arxiv.org/abs/2002.04688",
    )
    formula = "one cycle for the head at lr, then one for everything: lr/2 (head), lr/(2 sqrt(m)), lr/(2 m) (stem)"
    recommended = {
        "learning_rate": LearningRate(2e-3, "code", sgd=2e-2),
        "weight_decay": Recommended(0.01, "code"),
        "adam_beta2": Recommended(0.99, "code"),
        "adam_epsilon": Recommended(1e-5, "code"),
        "max_grad_norm": Recommended(0.0, "code"),
    }
    tuned = {"lr_mult": Choice((10.0, 100.0))}
    cost = advising.EVERYTHING
    advice = {
        advising.GOOD_FEATURES_FEW_SAMPLES: 1,
        advising.FAIR_FEATURES: 1,
        advising.LOW_GRADIENT: -1,
        advising.HIGH_GRADIENT: 1,
    }

    freeze: float = option(
        0.2,
        "Fraction of the optimizer steps spent on the first cycle, in which only the head and the norms train; 1 / "
        "num_train_epochs for a single epoch, as in fastai.",
        range="[0, 1)",
    )
    lr_mult: float = option(
        100.0,
        "Ratio of the learning rates of the head and the lower half of the body in the second cycle.",
        range="[1, inf)",
        source="code",
    )
    pct_start: float = option(
        0.3, "Fraction of the second cycle before its learning rate peaks.", range="(0, 1)", source="code"
    )
    div: float = option(
        5.0,
        "Ratio of the learning rates at the peak and at the beginning of the second cycle.",
        range="[1, inf)",
        source="code",
    )
    train_norms: bool = option(
        True,
        "Whether the normalisation layers of the body train in the first cycle, at a tenth of the head's rate.",
        source="code",
    )

    def plan(self, model: nn.Module, state: State) -> Plan:
        anatomy = self.anatomy(model)
        head, (lower, upper) = anatomy.head.modules, halves(anatomy)
        steps = (1 / self.lr_mult, self.lr_mult**-0.5, 1.0)
        rates = tuple(Rate(g, scale=SECOND_CYCLE * s) for g, s in zip((lower, upper, head), steps, strict=True))
        second = one_cycle("finetune", ("",), rates, self.pct_start, self.div, 1 - self.freeze)
        if not self.freeze:
            return Plan(stages=(second,))
        norms = norms_of_body(model, head) if self.train_norms else ()
        rates = (Rate(head), Rate(norms, scale=FROZEN_RATE))
        return Plan(stages=(one_cycle("frozen", (*head, *norms), rates, FROZEN_PEAK, FROZEN_DIV, self.freeze), second))
