"""A recipe in the running, and how its brief training runs are judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_ft.core import State
from hf_ft.functional import calibrated_log_loss
from hf_ft.search.trials import Outcome
from hf_ft.strategies.auto.recipes import Recipe
from hf_ft.strategies.auto.result import Tried


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


def held_out_loss(logits: Tensor, labels: Tensor, loss: float, task_loss: Any) -> tuple[float, float | None]:
    """The log loss at the best temperature, and the accuracy; for other tasks, their own loss as is."""
    single = labels.dim() == 1 and not labels.is_floating_point() and logits.dim() == 2 and logits.shape[1] > 1
    several = labels.dim() == 2 and labels.shape == logits.shape and bool(((labels == 0) | (labels == 1)).all())
    if task_loss.compute_loss_func is not None or not (single or several):
        return loss, None
    found, _ = calibrated_log_loss(logits, labels, task_loss.class_weights)
    known = labels != -100
    accuracy = float((logits.argmax(dim=1)[known] == labels[known]).double().mean()) if single else None
    return found, accuracy
