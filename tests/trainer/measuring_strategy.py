"""A strategy for tests with features that the registered ones do not use yet: it measures, and its term trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ft import Context, FTConfig, Plan, State, Term, View, option, register


class CentreLoss(nn.Module):
    """Squared distance of the features from a trained centre, which starts at the inputs' mean."""

    def __init__(self, centre: float) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.full((), centre))

    def forward(self, view: View) -> Tensor:
        assert view.features is not None
        return (view.features - self.centre).square().mean()


@register("measured")
@dataclass(frozen=True, kw_only=True)
class MeasuredConfig(FTConfig):
    """Pulls the features to a centre that starts at the mean of the training inputs."""

    weight: float = option(0.1, "Weight of the term.", range="[0, inf)")

    def measure(self, model: nn.Module, context: Context) -> State:
        total, count = torch.zeros((), dtype=torch.float64), torch.zeros(())
        for batch in context.batches():
            values = batch["pixel_values"].double()
            total, count = total + values.sum(), count + values.numel()
        mean = context.reduce(total) / context.reduce(count)
        return State(tensors={"mean": mean}, info={"values": int(context.reduce(count))})

    def plan(self, model: nn.Module, state: State) -> Plan:
        term = CentreLoss(float(state.tensors["mean"]))
        return Plan(terms=(Term("centre", term, weight=self.weight, needs=frozenset({"features"})),))
