"""Short training runs within a search, all with the same initial weights, data order and budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from hf_ft.core.context import Recipe, Samples
from hf_ft.core.plan import stage_borders
from hf_ft.engine.frozen.recorder import RecordedRows, Recordings
from hf_ft.engine.objective import Objective
from hf_ft.engine.param_groups import stage_scheduler
from hf_ft.engine.run import Run
from hf_ft.metrics import LOCAL_METRICS, compute_metrics
from hf_ft.models.norms import batch_norms
from hf_ft.models.preserve import random_states_kept


def fit(
    run: Run,
    recipe: Recipe,
    batches: Batches,
    rows: Sequence[int],
    epochs: int,
    seed: int,
    after_epoch: Callable[[int, Objective], None],
) -> None:
    """Train a run's model on a subset of the samples.

    Args:
        batches: source of the samples.
        rows: indices of the samples.
        seed: seed of the data order and of dropout.
        after_epoch: called with the number of finished epochs, in evaluation mode; may raise to stop.
    """
    objective = run.objective(recipe.task_loss)
    model = run.model
    optimizer = recipe.optimizer(run.param_groups(recipe.learning_rate, recipe.weight_decay))
    order = [_epoch(rows, recipe, seed, epoch, model) for epoch in range(epochs)]
    total = sum(map(len, order))
    borders = stage_borders(run.plan.stages, total)
    scheduler = stage_scheduler(optimizer, run.plan.stages, borders, recipe.curve)
    at = run.stepper(objective, total, then=batches.follow, optimizer=optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    step, scaler = 0, recipe.scaler()
    with random_states_kept(seed):
        for epoch, chunks in enumerate(order):
            if run.plan.tensor_rates is not None:
                at(step)  # the stage of the epoch's first step
                at.begin_epoch(
                    epoch, Samples(len(rows), lambda some: batches.samples.read([rows[i] for i in some])), recipe
                )
            objective.train()
            for chunk in chunks:
                at(step)
                for start in range(0, len(chunk), recipe.batch_size):
                    some = chunk[start : start + recipe.batch_size]
                    with recipe.computing():
                        loss = objective(**batches.take(some))["loss"]
                    part: Tensor = loss if len(some) == len(chunk) else loss * (len(some) / len(chunk))
                    scaler.scale(part).backward()
                if recipe.max_grad_norm:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()
                step += 1
            objective.eval()
            with run.averaged():
                after_epoch(epoch + 1, objective)


def _epoch(rows: Sequence[int], recipe: Recipe, seed: int, epoch: int, model: nn.Module) -> list[list[int]]:
    """The rows of each update. A last row that would be a batch of its own is left out if the model has BatchNorm."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 7919 + epoch)).tolist()
    if len(order) > 1 and len(order) % recipe.batch_size == 1 and batch_norms(model):
        order.pop()
    size = recipe.batch_size * recipe.accumulation
    return [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


class Batches:
    """Batches of samples by index, from recorded activations if available, else read and collated.

    Args:
        samples: the samples.
        recordings: recorded activations of the model whose copies are trained.
    """

    def __init__(self, samples: Samples, recordings: Recordings | None = None) -> None:
        self.samples, self.recordings = samples, recordings
        self._store: RecordedRows | None = None
        self._device = torch.device("cpu")

    def follow(self, objective: Objective) -> None:
        """Start from the activations at the borders of the objective's current stage, if possible."""
        self._store = None
        self._device = next(objective.model.parameters()).device
        prefix = None if self.recordings is None else self.recordings.prefix(objective)
        if self.recordings is not None and prefix is not None:
            self._store = self.recordings.store(prefix)
            objective.prefix = prefix if self._store is not None else None

    def take(self, rows: Sequence[int]) -> dict[str, Any]:
        if self._store is None:
            return self.samples.read(rows)
        columns = self._store.take(torch.tensor(rows))
        return {name: column.to(self._device) for name, column in columns.items()}


def score(objective: Objective, recipe: Recipe, batches: Batches, rows: Sequence[int], metric: str) -> float:
    """Score by a metric of :data:`hf_ft.metrics.LOCAL_METRICS`, or ``"loss"``. Higher is better; errors are negated.

    Every call uses the same random numbers, so that augmented samples are the same for all candidates.
    """
    logits, labels, loss = predict(objective, recipe, batches, rows)
    if metric == "loss":
        return -loss
    prediction = EvalPrediction(logits.cpu().numpy(), labels.cpu().numpy())
    value = compute_metrics([metric])(prediction)[metric]
    return -value if "regression" in LOCAL_METRICS[metric].kinds else value


def predict(
    objective: Objective, recipe: Recipe, batches: Batches, rows: Sequence[int]
) -> tuple[Tensor, Tensor, float]:
    """Logits (n, ...), labels (n, ...) and the mean task loss of these samples, with the same random numbers always."""
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    losses: list[Tensor] = []
    with random_states_kept(0), torch.no_grad():
        for start in range(0, len(rows), recipe.batch_size):
            batch = batches.take(rows[start : start + recipe.batch_size])
            with recipe.computing():
                outputs = objective(**batch)
            logits.append(outputs["logits"].float())
            labels.append(batch["labels"])
            losses.append(outputs["loss"].float() * len(batch["labels"]))
    return torch.cat(logits), torch.cat(labels), float(torch.stack(losses).sum() / len(rows))
