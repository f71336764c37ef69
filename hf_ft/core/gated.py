"""The base of strategies that keep a pretrained path alongside the one that trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_ft.core import advising
from hf_ft.core.config import FTConfig
from hf_ft.core.context import State
from hf_ft.core.plan import Plan, Rate, Stage
from hf_ft.core.recommended import USUAL_RATE
from hf_ft.models.gated.model import AddPaths, check_not_computed_again, check_plain
from hf_ft.models.gated.paths import GATE


class GatedStrategy(FTConfig):
    """Base of strategies whose model mixes the two paths by a gate, which trains along with everything else."""

    recommended = USUAL_RATE
    cost = advising.WITH_A_FROZEN_COPY + advising.DEARER
    advice = {advising.GOOD_FEATURES_FEW_SAMPLES: 1, advising.POOR_FEATURES: -1}
    plain = False

    head_lr: float | None

    def gate(self, model: nn.Module) -> Any:
        """Settings of the gate for this model."""
        raise NotImplementedError(f"{type(self).__name__} does not define gate().")

    def gate_rate(self) -> float | None:
        """Learning rate of the gate; None for the same as everything else."""
        raise NotImplementedError(f"{type(self).__name__} does not define gate_rate().")

    def draws(self) -> bool:
        """Whether the gate draws random numbers for each sample in training."""
        return False

    def check_arguments(self, args: TrainingArguments) -> None:
        check_not_computed_again(args)

    def check_model(self, model: nn.Module) -> None:
        check_plain(model)
        self.gate(model).fitted(model)

    def plan(self, model: nn.Module, state: State) -> Plan:
        wanted = ((self.gate_rate(), (GATE,)), (self.head_lr, self.anatomy(model).head.modules))
        rates = tuple(Rate(names, lr=lr) for lr, names in wanted if lr is not None)
        stages = (Stage("train", rates=rates),)
        return Plan(surgery=(AddPaths(self.gate(model)),), stages=stages, draws=self.draws())
