"""Decay of a term's weight over a run, as pure functions of its progress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Decay", "decay"]

Schedule = Literal["linear", "cosine", "exponential", "step", "constant"]
STEEPNESS = 5.0  # of the exponential: e^-5 is 0.7 %, which is subtracted so that it ends at 0


def decay(schedule: Schedule, u: float) -> float:
    r"""A factor that decays from 1 at u = 0 to 0 at u = 1 and stays 0.

    .. math::
        \text{linear: } 1 - u, \quad \text{cosine: } \frac{1 + \cos \pi u}{2}, \quad
        \text{exponential: } \frac{e^{-5u} - e^{-5}}{1 - e^{-5}}, \quad \text{step: } [u < 1]

    ``constant`` is 1 for all u.
    """
    if schedule == "constant":
        return 1.0
    if u >= 1 - 1e-9:  # a quotient of step counts can miss 1 in the last digit
        return 0.0
    if schedule == "step":
        return 1.0
    if schedule == "linear":
        return 1.0 - u
    if schedule == "cosine":
        return (1.0 + math.cos(math.pi * u)) / 2
    end = math.exp(-STEEPNESS)
    return (math.exp(-STEEPNESS * u) - end) / (1.0 - end)


@dataclass(frozen=True)
class Decay:
    """Schedule of a term: :func:`decay` of the run's progress relative to the share at which it ends."""

    schedule: Schedule
    until: float

    def __call__(self, progress: float) -> float:
        return decay(self.schedule, progress / self.until)
