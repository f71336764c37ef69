"""Auto-RGN (surgical fine-tuning): each tensor's rate follows its relative gradient norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ft.core import (
    FTConfig,
    LearningRate,
    Names,
    Paper,
    Plan,
    State,
    TensorRates,
    advising,
    head_rates,
    option,
    register,
)
from hf_ft.models.names import covered
from hf_ft.models.norms import batch_norms


def relative_norms(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    r""":math:`\lVert g_i \rVert / \lVert \theta_i \rVert` of each tensor, (n,); 0 where the tensor is 0."""
    size = torch.stack(torch._foreach_norm([p.float() for p in parameters]))
    gradient = torch.stack(torch._foreach_norm([g.float() for g in gradients]))
    return torch.where(size > 0, gradient / size, 0.0)


@dataclass(frozen=True)
class RelativeNorms:
    """The relative gradient norm of each tensor."""

    def __call__(self, names: Sequence[str], parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        return relative_norms(parameters, gradients)


@dataclass(frozen=True)
class ByLargest:
    """Relative norms divided by the largest of them; 0 for the tensors that must not train."""

    still: Names

    def __call__(self, names: Sequence[str], norms: Tensor) -> Tensor:
        trains = torch.tensor([not covered(name, self.still) for name in names], device=norms.device)
        norms = torch.where(trains, norms, 0.0)
        largest = norms.max()
        return torch.where(largest > 0, norms / largest, trains.to(norms))


@register("auto_rgn")
@dataclass(frozen=True, kw_only=True)
class AutoRGNConfig(FTConfig):
    r"""Train each tensor at a rate proportional to its relative gradient norm, measured again in each epoch.

    At the beginning of an epoch, over ``batches`` batches of training samples,

    .. math::
        r_i = \operatorname{mean}_b \frac{\lVert g_{ib} \rVert}{\lVert \theta_i \rVert}, \qquad
        \eta_i = \eta \, \frac{r_i}{\max_j r_j}

    for each tensor :math:`\theta_i` of the body, with :math:`g_{ib}` its gradient on batch :math:`b`. The head trains
    at :math:`\eta`.
    """

    paper = Paper(
        "Lee, Chen, Tajwar, Kumar, Yao, Liang, Finn",
        "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
        "ICLR 2023",
        "https://arxiv.org/abs/2210.11466",
    )
    formula = "lr_i = lr r_i / max_j r_j;  r_i = mean over 5 batches of ||g_i|| / ||theta_i||, in each epoch"
    recommended = {"learning_rate": LearningRate(1e-3, sgd=1e-2, without_batch_norm=0.1)}
    cost = advising.EVERYTHING + advising.DEARER  # five additional steps in each epoch, and a group for each tensor
    advice = {advising.ONE_PART_STANDS_OUT: 2, advising.NO_PART_STANDS_OUT: -1, advising.LOW_GRADIENT: 1}

    batches: int = option(
        5, "Batches over which relative gradient norms are averaged in each epoch.", range="[1, inf)", source="code"
    )
    fresh_optimizer: bool = option(
        True, "Start each epoch without the optimizer's momentum and moments.", source="code"
    )
    train_batch_norm: bool = option(
        False, "Whether scale and shift of BatchNorm train; its statistics are updated in any case.", source="code"
    )
    head_lr: float | None = option(None, "Learning rate of the head; None to use args.learning_rate.", range="(0, inf)")

    def plan(self, model: nn.Module, state: State) -> Plan:
        anatomy = self.anatomy(model)
        head = anatomy.head.modules
        body = tuple(name for part in anatomy.backbone for name in part.modules)
        still = () if self.train_batch_norm else tuple(name for name, _ in batch_norms(model))
        tensors = TensorRates(
            "auto_rgn", RelativeNorms(), ByLargest(still), body, self.batches, fresh_optimizer=self.fresh_optimizer
        )
        return Plan(rates=head_rates(self, head, state), tensor_rates=tensors)
