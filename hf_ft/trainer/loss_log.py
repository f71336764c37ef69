"""Means of the loss and its terms between two logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _TermLog:
    """Sums of the loss's summands since the last log, on their device: reading them each step would wait."""

    sums: dict[str, Tensor] | None = None
    count: int = 0

    def add(self, terms: dict[str, Tensor] | None) -> None:
        if terms is None:
            return
        self.sums = self.sums or {}
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1

    def drain(self, accelerator: Any) -> dict[str, float]:
        if not self.sums:
            return {}
        means = torch.stack([value.float() for value in self.sums.values()]) / self.count
        values = accelerator.reduce(means, reduction="mean").tolist()
        names, self.sums, self.count = list(self.sums), None, 0
        return {f"loss/{name}": value for name, value in zip(names, values, strict=True)}
