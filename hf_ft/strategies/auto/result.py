"""The result of a choice: what was tried, what was not and why, and what is trained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_ft.records import restored


@dataclass(frozen=True)
class Tried:
    """A recipe that was trained briefly.

    Attributes:
        strategy: its name.
        rate: the learning rate; None for that of the arguments, or one fitted to the head.
        expected: expected gain over full fine-tuning by earlier comparisons, as a share of test samples.
        losses: log loss on the held-out samples of each fold, infinite if the training diverged.
        accuracies: share of them classified correctly; empty if they do not have one class each.
        cost: of one complete training run, in full fine-tunings.
        error: standard error of the difference of its mean loss from that of the most promising strategy, the one with
            the highest expected gain; 0 if it is unknown.
    """

    strategy: str
    rate: float | None
    expected: float
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    cost: float
    error: float = 0.0

    def mean(self, folds: int | None = None) -> float:
        """The mean loss of the first folds."""
        return statistics.fmean(self.losses[:folds]) if self.losses else math.inf


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        chosen: name of the chosen strategy.
        rate: its learning rate, as in :class:`Tried`.
        tried: the recipes that were trained briefly, in the order in which they were tried.
        declined: why others were not, by name.
        epochs: length of a brief training run.
        budget: what the whole run may cost, in full fine-tunings.
        searching: what the choice cost.
        finishing: what the training that follows costs.
        signals: what was measured of model and data (:meth:`hf_ft.advice.Signals.to_dict`); empty if nothing was.
    """

    chosen: str
    rate: float | None
    tried: tuple[Tried, ...]
    declined: Mapping[str, str]
    epochs: int
    budget: float
    searching: float
    finishing: float
    signals: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranking(self) -> tuple[Tried, ...]:
        """What was tried, best first: by the number of folds, then by the mean loss."""
        return ranked(self.tried)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serializable dictionary; infinite losses are null."""
        content = asdict(self)
        for one in content["tried"]:
            one["losses"] = [value if math.isfinite(value) else None for value in one["losses"]]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Choice:
        """Read the output of :meth:`to_dict`.

        Raises:
            CheckpointError: if a field is missing or of another type; the message names it.
        """
        return restored(cls, content, "the choice of a strategy", null=math.inf)


def ranked(tried: Iterable[Tried]) -> tuple[Tried, ...]:
    """By the number of folds, then by the mean loss on them; ties in the order in which they were tried.

    The loss is rounded: the last digits differ between machines, and with what is recorded.
    """
    return tuple(sorted(tried, key=lambda one: (-len(one.losses), round(one.mean(), 4))))


def winner(tried: Sequence[Tried]) -> Tried:
    """The one with the lowest loss, if it is below that of the most promising one by more than a standard error.

    Otherwise, the most promising one, unless it was dropped before the last fold: the more strategies are tried, the
    more likely one of them is ahead by chance.
    """
    best = ranked(tried)[0]
    favourite = max(tried, key=lambda one: one.expected)
    dropped = len(favourite.losses) < len(best.losses)
    return best if dropped or favourite.mean() - best.mean() > best.error else favourite
