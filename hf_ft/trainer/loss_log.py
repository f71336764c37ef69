"""Means of the loss and its terms between two logs."""

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
    """Sums of the loss's summands since the last log, on their device: reading them each step would wait.

    Attributes:
        terms: those of the plan.
        told: the names of those of which it was said that they were 0.
    """

    terms: Sequence[Term]
    told: set[str] = field(default_factory=set)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _count: int = 0

    def add(self, terms: Mapping[str, Tensor] | None) -> None:
        """Add the summands of one micro-batch."""
        if terms is None:
            return
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Their means over all processes, as ``loss/<name>``; and begin anew."""
        if not self._sums:
            return {}
        means = torch.stack([value.float() for value in self._sums.values()]) / self._count
        values = accelerator.reduce(means, reduction="mean").tolist()
        logged = {f"loss/{name}": value for name, value in zip(self._sums, values, strict=True)}
        self._sums, self._count = {}, 0
        self._warn_of_zeros(logged)
        return logged

    def _warn_of_zeros(self, logged: Mapping[str, float]) -> None:
        """A term that is exactly 0 may have nothing to work on: told where values are read anyway, at a log."""
        for term in self.terms:
            if term.zero_means and logged.get(f"loss/{term.name}") == 0.0 and term.name not in self.told:
                self.told.add(term.name)
                logger.warning(f"loss/{term.name} was exactly 0 since the last log: {term.zero_means}.")
