"""What may be tuned of a strategy: small spaces, declared beside its options, and points spread over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.stats.qmc import Sobol


@dataclass(frozen=True)
class LogRange:
    """Numbers from ``low`` to ``high``, uniform in their logarithm."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """The value at a share in [0, 1) of the range, to four digits: as it is printed, so it can be repeated."""
        return float(f"{self.low * (self.high / self.low) ** share:.4g}")

    def on_edge(self, value: float) -> bool:
        """Whether it lies within a twentieth of the range from an end, on the logarithmic scale."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return not 0.05 <= share <= 0.95


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        return self.values[int(share * len(self.values))]

    def on_edge(self, value: Any) -> bool:
        return False


Space = Mapping[str, LogRange | Choice]


def spread(space: Space, count: int, seed: int) -> list[dict[str, Any]]:
    """Points that cover a space evenly: a scrambled Sobol' sequence, of which a longer one begins with a shorter.

    Unlike points that a sampler chooses by earlier results, they are the same however many workers share them, and
    after an interruption. The first name of two spaces takes the same values in both, with the same seed.

    Args:
        space: by name.
        count: how many points.
        seed: of the scrambling.
    """
    if not space or not count:
        return [{} for _ in range(count)]
    # All dimensions are always drawn, so that the first ones do not depend on how many are used.
    points = _sobol(max(8, len(space)), math.ceil(math.log2(count)), seed)
    return [
        {name: part.at(float(x)) for (name, part), x in zip(space.items(), point, strict=False)}
        for point in points[:count]
    ]


@lru_cache(64)  # a comparison asks for the same points hundreds of times
def _sobol(dimensions: int, exponent: int, seed: int) -> np.ndarray:
    points: np.ndarray = Sobol(dimensions, rng=seed).random_base2(exponent)
    return points


def edges(space: Space, values: Mapping[str, Any]) -> Sequence[str]:
    """The names whose value lies on the edge of its range: the best one may lie beyond."""
    return [name for name, part in space.items() if values.get(name) is not None and part.on_edge(values[name])]
