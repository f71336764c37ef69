"""Means of the loss terms between two log entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging

from hf_ft.core.plan import Term

logger = logging.get_logger(__name__)


@dataclass
class TermLog:
    """Running sums of the loss terms since the last log, kept on their device to avoid a synchronisation per step.

    Attributes:
        terms: the terms of the plan.
        told: names of the terms for which a warning about a value of 0 was already issued.
        update_size: number of micro-batches of the current update.
    """

    terms: Sequence[Term]
    told: set[str] = field(default_factory=set)
    update_size: int = 1
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _updates: float = 0.0

    def add(self, terms: Mapping[str, Tensor] | None) -> None:
        """Add the loss terms of one micro-batch."""
        if terms is None:
            return
        for name, value in terms.items():
            value = value / self.update_size
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._updates += 1 / self.update_size

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes as ``loss/<name>`` and reset the sums."""
        if not self._sums:
            return {}
        means = torch.stack([value.float() for value in self._sums.values()]) / self._updates
        values = accelerator.reduce(means, reduction="mean").tolist()
        logged = {f"loss/{name}": value for name, value in zip(self._sums, values, strict=True)}
        self._sums, self._updates = {}, 0.0
        self._warn_of_zeros(logged)
        return logged

    def _warn_of_zeros(self, logged: Mapping[str, float]) -> None:
        """Warn about terms that are exactly 0, which may have no effect; checked only when values are logged anyway."""
        for term in self.terms:
            if term.zero_means and logged.get(f"loss/{term.name}") == 0.0 and term.name not in self.told:
                self.told.add(term.name)
                logger.warning(f"loss/{term.name} has been exactly 0 since the last log: {term.zero_means}.")
