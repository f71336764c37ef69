"""The rates of single tensors: a look at a few batches of training samples at the beginning of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import logging

from hf_ft.core.context import Recipe, Samples
from hf_ft.core.plan import TensorRates
from hf_ft.engine.objective import Objective
from hf_ft.engine.param_groups import EPOCH, FACTOR
from hf_ft.engine.step_hooks import unwrapped
from hf_ft.errors import OptionError
from hf_ft.models.names import covers
from hf_ft.models.preserve import buffers_kept, random_states_kept

logger = logging.get_logger(__name__)

SPREAD = 7919  # between the seeds of neighbouring epochs


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
    """Set the factors of the optimizer's groups for an epoch, unless they were found before, as after a resume.

    Args:
        epoch: number of the epoch, from 0.
        samples: training samples.
        recipe: sizes of batches, task loss and autocast.
        seed: decides on the batches, together with the epoch; by default the seed of torch.
        reduce: sums a tensor over all processes, which share the batches.
        rank: index of this process.
        ranks: number of processes.
    """
    rates, groups = objective.plan.tensor_rates, [g for g in optimizer.param_groups if FACTOR in g]
    if rates is None or not groups or all(group[EPOCH] == epoch for group in groups):
        return
    if not samples.count:
        raise OptionError(
            f"{rates.name} reads training samples by index: train_dataset must be map-style and not empty."
        )
    if rates.fresh_optimizer:
        unwrapped(optimizer).state.clear()
    seed = (torch.initial_seed() if seed is None else seed) * SPREAD + epoch
    chosen = batches(samples.count, recipe.batch_size * recipe.accumulation * ranks, rates.batches, seed)
    with random_states_kept(seed % 2**32), buffers_kept(objective.model):
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
    objective.train()
    total = torch.zeros(len(names), device=parameters[0].device)
    for rows in chosen[rank::ranks]:
        gradients = _gradients(objective, parameters, samples, recipe, rows)
        total += rates.measure(names, [parameter.detach() for parameter in parameters], gradients)
    found = rates.factors(names, reduce(total) / len(chosen)).tolist()
    if not all(map(math.isfinite, found)):
        logger.warning(
            f"{rates.name}: gradients are not finite; each tensor keeps the rate of its stage in this epoch."
        )
        return {}
    return dict(zip(map(id, parameters), found, strict=True))


def batches(count: int, size: int, number: int, seed: int) -> list[list[int]]:
    """Rows of the first batches of shuffled samples; one that is not full only if there is no other."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    found = [order[begin : begin + size] for begin in range(0, min(count, number * size), size)]
    return [rows for rows in found if len(rows) == size] or found


def _gradients(
    objective: Objective, parameters: Sequence[nn.Parameter], samples: Samples, recipe: Recipe, rows: Sequence[int]
) -> list[Tensor]:
    """The gradients of the mean task loss over some samples, as many at once as in training; 0 where it has none."""
    for begin in range(0, len(rows), recipe.batch_size):
        some = rows[begin : begin + recipe.batch_size]
        batch = samples.read(some)
        with recipe.computing():
            loss, _ = objective.task_loss(objective.model, batch)
        (loss * (len(some) / len(rows))).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    objective.zero_grad()
    return found
