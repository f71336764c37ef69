"""The rates of single tensors, from a few batches of training samples at the beginning of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils import logging

from hf_ft.core.context import Recipe, Samples
from hf_ft.core.plan import TensorRates
from hf_ft.data.streams import mixed
from hf_ft.engine.gradients import looking, mean_gradients, update_batches
from hf_ft.engine.objective import Objective
from hf_ft.engine.param_groups import EPOCH, FACTOR
from hf_ft.engine.step_hooks import unwrapped
from hf_ft.models.names import covers

logger = logging.get_logger(__name__)


def find_rates(
    objective: Objective,
    optimizer: Optimizer,
    epoch: int,
    samples: Samples,
    recipe: Recipe,
    seed: int | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Set the factors of the optimizer's groups for an epoch, unless they were determined before, as after a resume.

    Args:
        epoch: number of the epoch, from 0.
        samples: training samples.
        recipe: sizes of batches, task loss and autocast.
        seed: determines the batches, together with the epoch; by default, torch's seed.
        reduce: sums a tensor over all processes, which share the batches.
        rank: index of this process.
        ranks: number of processes.
    """
    rates, groups = objective.plan.tensor_rates, [g for g in optimizer.param_groups if FACTOR in g]
    if rates is None or not groups or all(group[EPOCH] == epoch for group in groups):
        return
    if rates.fresh_optimizer:
        unwrapped(optimizer).state.clear()
    seed = mixed(torch.initial_seed() if seed is None else seed, epoch)
    chosen = batches(samples, recipe, rates.batches, ranks, seed)
    with looking(objective.model, seed):
        found = _factors(objective, rates, samples, recipe, chosen, rank, ranks, reduce)
    for group in groups:
        group[FACTOR], group[EPOCH] = found.get(id(group["params"][0]), 1.0), epoch


def _factors(
    objective: Objective,
    rates: TensorRates,
    samples: Samples,
    recipe: Recipe,
    chosen: Sequence[Sequence[int]],
    rank: int,
    ranks: int,
    reduce: Callable[[Tensor], Tensor],
) -> dict[int, float]:
    """The factor of each parameter that trains and has a rate of its own, by its id."""
    named = [
        (name, parameter)
        for name, parameter in objective.model.named_parameters()
        if parameter.requires_grad and any(covers(prefix, name) for prefix in rates.on)
    ]
    if not named:
        return {}
    names, parameters = zip(*named, strict=True)
    objective.train()  # what is frozen stays in eval mode
    total = torch.zeros(len(names), device=parameters[0].device)
    for rows in chosen[rank::ranks]:
        gradients = mean_gradients(objective.model, parameters, samples, recipe, rows)
        if gradients is not None:
            total += rates.measure(names, [parameter.detach() for parameter in parameters], gradients)
    found = rates.factors(names, reduce(total) / len(chosen)).tolist()
    if not all(map(math.isfinite, found)):
        logger.warning(
            f"{rates.name}: gradients are not finite; each tensor keeps the rate of its stage in this epoch."
        )
        return {}
    return dict(zip(map(id, parameters), found, strict=True))


def batches(samples: Samples, recipe: Recipe, number: int, ranks: int, seed: int) -> list[list[int]]:
    """Rows of the batches to use; a batch that is not full only if there is no other."""
    found = update_batches(samples, recipe, ranks, torch.Generator().manual_seed(seed))
    return [rows for rows in found if len(rows) == len(found[0])][:number]
