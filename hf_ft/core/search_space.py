"""Search spaces: the tunable options of a strategy with their ranges, and points spread over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.stats.qmc import Sobol

from hf_ft.errors import OptionError


@dataclass(frozen=True)
class LogRange:
    """Numbers from ``low`` to ``high``, log-uniform."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """The value at a share in [0, 1) of the range, rounded to four digits as printed, so it is reproducible."""
        return float(f"{self.low * (self.high / self.low) ** share:.4g}")

    def on_edge(self, value: float) -> bool:
        """Whether a value lies within a twentieth of the range from either end, on the logarithmic scale."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return not 0.05 <= share <= 0.95


@dataclass(frozen=True)
class Choice:
    """One of a few values.

    Attributes:
        rates: for each value, a factor of the learning rate with which it trains well. By default, a comparison uses
            the rates that the strategy recommends with each value.

    Raises:
        OptionError: if ``rates`` are given, but not a positive one for each value.
    """

    values: tuple[Any, ...]
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rates and (len(self.rates) != len(self.values) or min(self.rates) <= 0):
            raise OptionError(f"rates={self.rates}: give a positive factor for each of the values {self.values}.")

    def at(self, share: float) -> Any:
        return self.values[int(share * len(self.values))]

    def on_edge(self, value: Any) -> bool:
        return False

    def rate_factor(self, value: Any) -> float:
        return self.rates[self.values.index(value)] if self.rates and value in self.values else 1.0


@dataclass(frozen=True)
class FittedRate:
    """Learning rates of a head around the one that is fitted to its features (:mod:`hf_ft.core.head_rate`).

    Attributes:
        below, above: factors by which they may differ from it. Above it, training soon diverges.
    """

    below: float = 10.0
    above: float = 3.0

    def around(self, rate: float) -> LogRange:
        return LogRange(float(f"{rate / self.below:.3g}"), float(f"{rate * self.above:.3g}"))


RATE = "learning_rate"
# Tuned by strategies that train all weights: which suits depends on the data, see docs/rates.md.
NORM_MODES = {"norm_mode": Choice(("auto", "eval"))}
Space = Mapping[str, LogRange | Choice]  # of one model and optimizer
Declared = Mapping[str, LogRange | Choice | FittedRate]


def spread(space: Space, count: int, seed: int) -> list[dict[str, Any]]:
    """Points that cover a space evenly: a scrambled Sobol' sequence, which is a prefix of any longer one.

    Unlike points sampled from earlier results, they do not depend on the number of workers or on interruptions. With
    the same seed, the first name of two spaces takes the same values in both.

    Args:
        space: the space, by option name.
        count: number of points.
        seed: seed of the scrambling.
    """
    if not space or not count:
        return [{} for _ in range(count)]
    # All dimensions are always drawn, so that the first ones do not depend on how many are used.
    points = _sobol(max(8, len(space)), math.ceil(math.log2(count)), seed)
    found = [
        {name: part.at(float(x)) for (name, part), x in zip(space.items(), point, strict=False)}
        for point in points[:count]
    ]
    return [_scaled(point, rate_factor(space, point)) for point in found]


def rate_factor(space: Space, values: Mapping[str, Any]) -> float:
    """The factor of the learning rate that the chosen values imply."""
    choices = ((part, values.get(name)) for name, part in space.items() if isinstance(part, Choice))
    return math.prod(part.rate_factor(value) for part, value in choices)


def within(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the learning rate as a position in its range: without the factor that other values imply."""
    return _scaled(values, 1 / rate_factor(space, values))


def _scaled(values: Mapping[str, Any], factor: float) -> dict[str, Any]:
    rate = values.get(RATE)
    return dict(values) if rate is None or factor == 1 else {**values, RATE: float(f"{rate * factor:.4g}")}


@lru_cache(64)  # a comparison asks for the same points hundreds of times
def _sobol(dimensions: int, exponent: int, seed: int) -> np.ndarray:
    points: np.ndarray = Sobol(dimensions, rng=seed).random_base2(exponent)
    return points


def edges(space: Space, values: Mapping[str, Any]) -> Sequence[str]:
    """Names whose value lies at the edge of its range, so that the optimum may lie outside."""
    placed = within(space, values)
    return [name for name, part in space.items() if placed.get(name) is not None and part.on_edge(placed[name])]
