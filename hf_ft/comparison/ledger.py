"""Which trainings of a comparison are done, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_ft.comparison.results import Training, training_from_dict
from hf_ft.search.trials import Outcome

TUNING_SEED = 0  # final runs have seeds from 1: none of them was tuned on
DIGITS = 9  # means of floats that are as near are equal


@dataclass(frozen=True)
class Done:
    """A finished job: a training, and what else was found out in it."""

    training: Training
    seconds: float
    refused: bool = False
    measured_compute: float = 0.0
    found: Mapping[str, Any] = field(default_factory=dict)
    learned: str = ""


def _done(outcome: Outcome) -> Done:
    info = outcome.info
    return Done(
        training_from_dict(info["training"]),
        outcome.seconds,
        info["refused"],
        info["measured_compute"],
        info["found"],
        info["learned"],
    )
