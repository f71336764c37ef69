r"""A particle swarm over the numbers of frozen layers of several models.

A particle is a point :math:`x \in \mathbb{R}^N`; its coordinate :math:`j` lies in :math:`[0, L_j - 1]` and is truncated
to the number of frozen layers of model :math:`j`. Iteration :math:`t` moves all particles:

.. math::
    v \leftarrow \text{clip}(w_t v + c_1 r_1 (p - x) + c_2 r_2 (g - x), -b, b), \qquad
    x \leftarrow \text{clip}(x + v, 0, L - 1)

:math:`p` is the best position of the particle, :math:`g` that of the swarm, and :math:`r_1, r_2 \sim U[0, 1)` are
scalars drawn per particle. Each particle draws from its own generator, see :func:`generator`.

Reference: Feng et al. (AMCF), PeerJ Computer Science, article 2107. Ours: all particles of a generation are scored
before any best position changes, so they can train in parallel; the authors update the swarm's best after each one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_ft.errors import OptionError

__all__ = ["Swarm", "begin", "generator", "inertia", "move", "remember", "step", "truncated", "velocity_bound"]

Floats = NDArray[np.float64]

PARTICLES = 10  # code
ITERATIONS = 5  # code
INERTIA = 1.4  # code: in the first iteration
INERTIA_FALL = 0.7  # code: over all iterations
PULL = 1.5  # code: c_1 and c_2
BOUND_SHARE = 0.1  # ours: share of a model's layers; the authors use 5 for models of 49 layers


@dataclass(frozen=True, eq=False)
class Swarm:
    """All particles of one generation. The arrays are read-only copies.

    Attributes:
        generation: number of moves so far.
        positions: (P, N).
        velocities: (P, N).
        best_positions: (P, N), each particle's best position so far; undefined if its best score is ``-inf``.
        best_scores: (P,), ``-inf`` for a particle without a finite score so far.
        leader: (N,), the best position of the swarm; undefined if its score is ``-inf``.
        leader_score: score of the leader.
    """

    generation: int
    positions: Floats
    velocities: Floats
    best_positions: Floats
    best_scores: Floats
    leader: Floats
    leader_score: float

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name not in ("generation", "leader_score")):
            value = np.array(getattr(self, name), dtype=np.float64)
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def integers(self) -> tuple[tuple[int, ...], ...]:
        """Number of frozen layers of each model, per particle; particles may coincide."""
        return truncated(self.positions)


def truncated(positions: ArrayLike) -> tuple[tuple[int, ...], ...]:
    """Positions (P, N), truncated to integers."""
    return tuple(tuple(map(int, row)) for row in np.asarray(positions, dtype=np.float64).tolist())


def generator(seed: int, generation: int, particle: int) -> np.random.Generator:
    """The random generator of a particle in a generation: ``default_rng([seed, generation, particle])``.

    Generation 0 draws N numbers for the position and N for the velocity; later generations draw :math:`r_1` and
    :math:`r_2`. No draw depends on other particles, so each can be moved independently, in any process.

    Raises:
        OptionError: if the seed is negative.
    """
    if seed < 0:
        raise OptionError(f"seed={seed!r} is negative. Give 0 or more.")
    return np.random.default_rng([seed, generation, particle])


def velocity_bound(layers: Sequence[int]) -> Floats:
    r"""The largest move of each coordinate per iteration, :math:`b_j = \max(1, \text{round}(0.1 L_j))`, (N,).

    Raises:
        OptionError: if there is no model, or one has no layers.
    """
    return np.array([max(1, round(BOUND_SHARE * count)) for count in _checked(layers)], dtype=np.float64)


def inertia(iteration: int, iterations: int = ITERATIONS) -> float:
    r"""The inertia weight of the velocity, :math:`w_t = 1.4 - 0.7 t / T`.

    Args:
        iteration: t, from 0.
        iterations: T, the number of iterations.

    Raises:
        OptionError: if there are no iterations, or ``iteration`` is out of range.
    """
    if iterations < 1:
        raise OptionError(f"iterations={iterations!r} is less than 1. Default: {ITERATIONS}.")
    if not 0 <= iteration < iterations:
        raise OptionError(f"iteration={iteration!r} lies outside [0, {iterations}): raise iterations to continue.")
    return INERTIA - iteration * INERTIA_FALL / iterations


def begin(layers: Sequence[int], particles: int = PARTICLES, seed: int = 0) -> Swarm:
    r"""Generation 0, unscored: :math:`x_j \sim U[0, L_j - 1]`, :math:`v_j \sim U[-b_j, b_j]`.

    Args:
        layers: (N,), number of layers of each model.
        particles: number of particles P.
        seed: seed of all draws.

    Raises:
        OptionError: if there are no particles or models, a model has no layers, or the seed is negative.
    """
    bound, top = velocity_bound(layers), _top(layers)
    if particles < 1:
        raise OptionError(f"particles={particles!r} is less than 1. Default: {PARTICLES}.")
    # (P, 2, N): position, then velocity.
    draws = np.stack([generator(seed, 0, particle).random((2, len(top))) for particle in range(particles)])
    positions = draws[:, 0] * top
    return Swarm(
        generation=0,
        positions=positions,
        velocities=(2 * draws[:, 1] - 1) * bound,
        best_positions=positions,
        best_scores=np.full(particles, -np.inf),
        leader=positions[0],
        leader_score=-np.inf,
    )


def remember(swarm: Swarm, scores: Sequence[float]) -> Swarm:
    """The same swarm with updated best positions; only a strictly better score replaces an earlier one.

    Args:
        scores: (P,), scores of the current positions, higher is better; ``-inf`` if training diverged. Ties for the
            lead go to the particle with the lowest index.

    Raises:
        OptionError: if there is not exactly one score per particle, or a score is nan.
    """
    values, count = np.asarray(scores, dtype=np.float64), len(swarm.positions)
    if values.shape != (count,):
        raise OptionError(f"scores has shape {values.shape}, not ({count},): give one number per particle.")
    if np.isnan(values).any():
        raise OptionError(f"scores[{int(np.isnan(values).argmax())}] is nan: use -inf for a run that diverged.")
    better, first = values > swarm.best_scores, int(values.argmax())
    leads = values[first] > swarm.leader_score
    return replace(
        swarm,
        best_positions=np.where(better[:, None], swarm.positions, swarm.best_positions),
        best_scores=np.where(better, values, swarm.best_scores),
        leader=swarm.positions[first] if leads else swarm.leader,
        leader_score=float(values[first]) if leads else swarm.leader_score,
    )


def move(swarm: Swarm, layers: Sequence[int], iterations: int = ITERATIONS, seed: int = 0) -> Swarm:
    """The next generation: velocities and positions are updated, nothing is scored.

    A particle or swarm without a finite best score exerts no pull.

    Args:
        layers: (N,), number of layers of each model.
        iterations: number of iterations T; the last move yields generation T.
        seed: seed of all draws.

    Raises:
        OptionError: if the layers do not match the swarm, no iteration is left, or the seed is negative.
    """
    bound, top, here = velocity_bound(layers), _top(layers), swarm.positions
    if here.shape[1] != len(top):
        raise OptionError(
            f"layers={list(layers)!r} does not match the swarm, whose positions have {here.shape[1]} entries."
        )
    kept, following = inertia(swarm.generation, iterations), swarm.generation + 1
    own, shared = np.stack([generator(seed, following, i).random(2) for i in range(len(here))]).T[..., None]
    best = np.where((swarm.best_scores > -np.inf)[:, None], swarm.best_positions, here)
    leader = swarm.leader if swarm.leader_score > -np.inf else here
    velocities = kept * swarm.velocities + PULL * own * (best - here) + PULL * shared * (leader - here)
    velocities = np.clip(velocities, -bound, bound)
    return replace(swarm, generation=following, positions=np.clip(here + velocities, 0, top), velocities=velocities)


def step(
    swarm: Swarm, scores: Sequence[float], layers: Sequence[int], iterations: int = ITERATIONS, seed: int = 0
) -> Swarm:
    """:func:`remember` the scores of the current positions, then :func:`move`."""
    return move(remember(swarm, scores), layers, iterations, seed)


def _checked(layers: Sequence[int]) -> Sequence[int]:
    if not len(layers):
        raise OptionError("layers is empty: give the number of layers of each model.")
    if min(layers) < 1:
        raise OptionError(f"layers={list(layers)!r} has an entry below 1: each model needs at least one layer.")
    return layers


def _top(layers: Sequence[int]) -> Floats:
    return np.array(_checked(layers), dtype=np.float64) - 1
