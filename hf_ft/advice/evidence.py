"""What is known from earlier comparisons before any measurement: each strategy's mean gain, and the worth of a rule.

The score of a strategy is its expected gain over full fine-tuning: the mean gain in earlier comparisons plus the
points of the rules that hold, each worth the same. Both are fitted to all comparisons that are kept
(:mod:`hf_ft.advice.fit`) and shipped as ``evidence.json``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_ft.core.config import BASELINE
from hf_ft.records import restored

__all__ = ["RULES_ALONE", "Evidence", "Gain", "shipped"]

FILE = Path(__file__).parent / "evidence.json"
PRIOR_TASKS = 2.0  # the mean gain of all strategies counts as much as this many tasks (ours)


@dataclass(frozen=True)
class Gain:
    """The mean gain over full fine-tuning, as a share of test samples (balanced), over a number of tasks."""

    mean: float
    tasks: int


@dataclass(frozen=True)
class Evidence:
    r"""What earlier comparisons say.

    The expected gain of a strategy s with mean gain :math:`g_s` over :math:`n_s` tasks and rule points :math:`p_s` is

    .. math:: \frac{n_s g_s + 2 \bar g}{n_s + 2} + w p_s,

    where :math:`\bar g` is the mean of the gains of all strategies: the less often a strategy was compared, the closer
    its estimate is to the average.

    Attributes:
        gains: the gain of every strategy that was compared.
        worth: what one rule point is worth, w. With 0 the order is the same for all data.
    """

    gains: Mapping[str, Gain] = field(default_factory=dict)
    worth: float = 0.0

    def expected(self, strategy: str) -> float:
        """The expected gain without the rules; 0 for full fine-tuning itself."""
        if strategy == BASELINE or not self.gains:
            return 0.0
        others = [gain.mean for name, gain in self.gains.items() if name != BASELINE]
        overall = sum(others) / len(others) if others else 0.0
        own = self.gains.get(strategy, Gain(0.0, 0))
        return (own.tasks * own.mean + PRIOR_TASKS * overall) / (own.tasks + PRIOR_TASKS)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serializable dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Evidence:
        """Read the output of :meth:`to_dict`.

        Raises:
            CheckpointError: if a field is missing or of another type; the message names it.
        """
        return restored(cls, content, "the evidence of earlier comparisons")


RULES_ALONE = Evidence(worth=1.0)


@functools.cache
def shipped() -> Evidence:
    """The evidence of the comparisons behind docs/results.md."""
    return Evidence.from_dict(json.loads(FILE.read_text(encoding="utf-8")))
