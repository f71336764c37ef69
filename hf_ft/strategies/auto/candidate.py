"""A recipe in the running, and how its brief training runs are judged."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_ft.core import State
from hf_ft.functional import calibrated_log_loss, log_losses
from hf_ft.search.trials import Outcome
from hf_ft.strategies.auto.recipes import Recipe
from hf_ft.strategies.auto.result import Tried, ranked, winner

COMPARED = 1000  # samples of a fold, at most
LEAST = 2  # candidates: with fewer, there is nothing to compare


@dataclass
class Candidate:
    """A recipe in the running.

    Attributes:
        ratio: cost of training it, in passes per sample and epoch.
        states: what it measured on the training part of each fold so far.
        outcomes: its brief training runs so far, one for each fold.
    """

    recipe: Recipe
    ratio: float
    states: list[State]
    outcomes: list[Outcome] = field(default_factory=list)

    def tried(self) -> Tried:
        infos = [outcome.info for outcome in self.outcomes]
        accuracies = tuple(float(info["accuracy"]) for info in infos if info.get("accuracy") is not None)
        losses = tuple(-outcome.value for outcome in self.outcomes)
        return Tried(self.recipe.name, self.recipe.rate, self.recipe.expected, losses, accuracies, self.ratio)

    def error_of_difference(self, other: Candidate) -> float:
        """The standard error of the difference of two mean losses, paired by sample; 0 if it is unknown."""
        pairs = zip(self.outcomes, other.outcomes, strict=False)
        both = [(one.info.get("losses") or (), two.info.get("losses") or ()) for one, two in pairs]
        gaps = [a - b for one, two in both for a, b in zip(one, two, strict=False)]
        return statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0


@dataclass(frozen=True)
class HeldOut:
    """How a brief training run does on the samples held out.

    Attributes:
        loss: the log loss at the best temperature; for other tasks, their own loss as is.
        accuracy: if each sample has one class.
        losses: the log loss of each sample, of evenly spread ones if there are many; empty for other tasks.
    """

    loss: float
    accuracy: float | None = None
    losses: tuple[float, ...] = ()


def held_out(logits: Tensor, labels: Tensor, loss: float, task_loss: Any) -> HeldOut:
    """Judge logits on held-out samples; ``loss``: the task's own."""
    single = labels.dim() == 1 and not labels.is_floating_point() and logits.dim() == 2 and logits.shape[1] > 1
    several = labels.dim() == 2 and labels.shape == logits.shape and bool(((labels == 0) | (labels == 1)).all())
    if task_loss.compute_loss_func is not None or not (single or several):
        return HeldOut(loss)
    found, temperature = calibrated_log_loss(logits, labels, task_loss.class_weights)
    known = labels != -100
    accuracy = float((logits.argmax(dim=1)[known] == labels[known]).double().mean()) if single else None
    if not math.isfinite(found):
        return HeldOut(found, accuracy)
    losses = log_losses(logits, labels, temperature, task_loss.class_weights)
    spread = torch.linspace(0, len(losses) - 1, min(COMPARED, len(losses))).round().long()
    return HeldOut(found, accuracy, tuple(round(value, 4) for value in losses[spread].tolist()))


def compared(candidates: Sequence[Candidate]) -> tuple[Tried, ...]:
    """Those that were trained briefly, each with the error of its difference from the most promising one."""
    tried = [candidate for candidate in candidates if candidate.outcomes]
    if not tried:
        return ()
    favourite = max(tried, key=lambda one: one.recipe.expected)
    return tuple(dataclasses.replace(one.tried(), error=one.error_of_difference(favourite)) for one in tried)


def better_half(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The half with the lowest losses, but at least two, and the one that would win now."""
    tried = compared(candidates)
    kept = {one.strategy for one in ranked(tried)[: max(LEAST, math.ceil(len(tried) / 2))]} | {winner(tried).strategy}
    return [candidate for candidate in candidates if candidate.recipe.name in kept]
