"""The base of strategies that measure nothing but a learning rate for the head."""

from __future__ import annotations

from torch import nn

from hf_ft.core.config import FTConfig
from hf_ft.core.context import Context, State
from hf_ft.core.head_rate import HeadRate, describe_head_rate, measure_head_rate


class FittedHead(FTConfig):
    """Base of strategies with an option ``head_lr`` that measure only what its value ``"auto"`` requires.

    Their plan takes the rate from :func:`~hf_ft.core.head_rate.head_rates`; if nothing can be measured, "auto" means
    ``args.learning_rate``.
    """

    head_lr: HeadRate

    def measure(self, model: nn.Module, context: Context) -> State:
        return State(info=measure_head_rate(self, model, context))

    def must_measure(self) -> bool:
        return False

    def learned(self, state: State) -> str:
        return describe_head_rate(state)
