"""Results of a swarm search: the path of each particle, and one score per trained position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_ft.errors import OptionError
from hf_ft.records import restored
from hf_ft.strategies.amcf.swarm import Swarm, truncated


@dataclass(frozen=True)
class Evaluation:
    """The score of one distinct position.

    Attributes:
        position: (N,), number of frozen layers of each model.
        score: score of the best epoch, higher is better; ``-inf`` if training diverged.
        epochs: number of epochs trained.
        seconds: training time.
        pruned: whether the run was stopped early, so that its score is not that of a complete run.
        steps: the score after each epoch.
    """

    position: tuple[int, ...]
    score: float
    epochs: int = 0
    seconds: float = 0.0
    pruned: bool = False
    steps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_scores(f"position {self.position}", (self.score, *self.steps))

    @property
    def ranks(self) -> bool:
        """Whether it can be the best: neither pruned nor diverged."""
        return not self.pruned and math.isfinite(self.score)


@dataclass(frozen=True)
class Generation:
    """All particles of one generation.

    Attributes:
        positions: (P, N).
        velocities: (P, N).
        scores: (P,), the score each particle received for its position; ``-inf`` if training diverged.
    """

    positions: tuple[tuple[float, ...], ...]
    velocities: tuple[tuple[float, ...], ...]
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        counts = len(self.positions), len(self.velocities), len(self.scores)
        if len(set(counts)) > 1 or not self.positions:
            raise OptionError(
                f"a generation has {counts[0]} positions, {counts[1]} velocities and {counts[2]} scores: give one of "
                "each per particle."
            )
        if not all(map(math.isfinite, itertools.chain(*self.positions, *self.velocities))):
            raise OptionError("a position or velocity of a generation is nan or inf: give finite numbers.")
        _check_scores("a generation", self.scores)

    @classmethod
    def of(cls, swarm: Swarm, scores: Iterable[float]) -> Generation:
        """The current positions of a swarm, with their scores (P,)."""
        positions, velocities = (tuple(map(tuple, array.tolist())) for array in (swarm.positions, swarm.velocities))
        return cls(positions, velocities, tuple(map(float, scores)))

    def integers(self) -> tuple[tuple[int, ...], ...]:
        """The positions as trained, (P, N)."""
        return truncated(self.positions)


@dataclass(frozen=True)
class SwarmScores:
    """The record of a search.

    Attributes:
        metric: metric of the scores; higher is better.
        members: (N,), the names of the models.
        layers: (N,), number of layers of each model.
        generations: all fully scored generations, in order.
        evaluations: one per distinct position, in order of the first visit.
        stopped: why the search ended early, in words; empty if it did not.
    """

    metric: str
    members: tuple[str, ...]
    layers: tuple[int, ...]
    generations: tuple[Generation, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    stopped: str = ""

    def __post_init__(self) -> None:
        if not self.members:
            raise OptionError("members is empty: name each model.")
        if len(self.members) != len(self.layers):
            raise OptionError(f"members={self.members!r} and layers={self.layers!r} differ in length: give one each.")
        for position in (position for generation in self.generations for position in generation.integers()):
            _check_position(position, self.layers)
        seen: set[tuple[int, ...]] = set()
        for position in (evaluation.position for evaluation in self.evaluations):
            _check_position(position, self.layers)
            if position in seen:
                raise OptionError(f"position {position} was evaluated twice: keep the first evaluation.")
            seen.add(position)

    @property
    def best(self) -> Evaluation:
        """The highest score among unpruned positions; ties go to the one visited first.

        Raises:
            OptionError: if all are pruned or diverged.
        """
        evaluation = self._best()
        if evaluation is None:
            raise OptionError(
                "no position was trained to the end with a finite score: lower the learning rate, or prune later."
            )
        return evaluation

    @property
    def visits(self) -> int:
        """Number of scores requested by particles, counting repeated visits in later generations."""
        visited = [position for generation in self.generations for position in generation.integers()]
        # A partially scored generation is not recorded, but its evaluations are.
        return len(visited) + len({evaluation.position for evaluation in self.evaluations} - set(visited))

    def evaluation(self, position: Sequence[int]) -> Evaluation | None:
        """The evaluation of a position, if it was trained."""
        return next((evaluation for evaluation in self.evaluations if evaluation.position == tuple(position)), None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serializable dictionary, with null for ``-inf``."""
        return {
            "metric": self.metric,
            "members": list(self.members),
            "layers": list(self.layers),
            "generations": [
                {
                    "positions": [list(row) for row in generation.positions],
                    "velocities": [list(row) for row in generation.velocities],
                    "scores": _numbers(generation.scores),
                }
                for generation in self.generations
            ],
            "evaluations": [
                {
                    "position": list(evaluation.position),
                    "score": _numbers([evaluation.score])[0],
                    "epochs": evaluation.epochs,
                    "seconds": evaluation.seconds,
                    "pruned": evaluation.pruned,
                    "steps": _numbers(evaluation.steps),
                }
                for evaluation in self.evaluations
            ],
            "stopped": self.stopped,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SwarmScores:
        """Read the output of :meth:`to_dict`.

        Raises:
            CheckpointError: if a field is missing or invalid; the message names it.
        """
        return restored(cls, content, "swarm scores", null=-math.inf, complete=True)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headers and one row of text per position, highest score first."""
        best = self._best()
        ordered = sorted(self.evaluations, key=lambda evaluation: -evaluation.score)
        return (*self.members, "score", "epochs", "seconds", "note"), [
            self._row(evaluation, best) for evaluation in ordered
        ]

    def verdict(self) -> str:
        """The conclusion of the search, for readers who do not know particle swarms."""
        best, trained = self._best(), len(self.evaluations)
        pruned = sum(evaluation.pruned for evaluation in self.evaluations)
        parts = ["no position was trained to the end with a finite score" if best is None else self._frozen(best)]
        parts.append(f"{trained} distinct positions were trained in {self.visits} visits")
        parts[-1] += f", {pruned} of them pruned" if pruned else ""
        nothing = self.evaluation([0] * len(self.members))
        if nothing is not None:
            parts.append(f"with nothing frozen: {_shown(nothing.score)}{' (pruned)' if nothing.pruned else ''}")
        return (
            "; ".join(parts) + "." + (f" The search ended early: {self.stopped.rstrip('.')}." if self.stopped else "")
        )

    def _best(self) -> Evaluation | None:
        ranked = (evaluation for evaluation in self.evaluations if evaluation.ranks)
        return max(ranked, key=lambda evaluation: evaluation.score, default=None)

    def _row(self, evaluation: Evaluation, best: Evaluation | None) -> tuple[str, ...]:
        notes = ["best" if evaluation is best else "", "pruned" if evaluation.pruned else ""]
        notes.append("" if math.isfinite(evaluation.score) else "diverged")
        frozen = (f"{count} of {total}" for count, total in zip(evaluation.position, self.layers, strict=True))
        numbers = f"{evaluation.score:.3f}", str(evaluation.epochs), f"{evaluation.seconds:.0f}"
        return *frozen, *numbers, ", ".join(filter(None, notes))

    def _frozen(self, evaluation: Evaluation) -> str:
        each = list(zip(evaluation.position, self.layers, self.members, strict=True))
        shares = [f"{each[0][0]} of {each[0][1]} layers of {each[0][2]}"]
        shares += [f"{count} of {total} of {name}" for count, total, name in each[1:]]
        listed = " and ".join(filter(None, [", ".join(shares[:-1]), shares[-1]]))
        what = f"{self.metric.replace('_', ' ')} {evaluation.score:.3f}"
        return f"{listed} frozen ({what} on held-out training samples)"


def _shown(score: float) -> str:
    return f"{score:.3f}" if math.isfinite(score) else "training diverged"


def _check_scores(whose: str, scores: Iterable[float]) -> None:
    if not all(score < math.inf for score in scores):  # also false for nan
        raise OptionError(f"a score of {whose} is nan or inf: use -inf for a run that diverged.")


def _check_position(position: tuple[int, ...], layers: tuple[int, ...]) -> None:
    if len(position) != len(layers) or not all(0 <= k < total for k, total in zip(position, layers, strict=True)):
        raise OptionError(f"position {position} does not match layers {layers}: give 0 to L - 1 for each model.")


def _numbers(scores: Iterable[float]) -> list[float | None]:
    return [score if math.isfinite(score) else None for score in scores]
