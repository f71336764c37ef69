"""What a comparison will take, told before it starts: a few passes of one batch are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_ft.comparison.clock import now
from hf_ft.comparison.contenders import Bench
from hf_ft.data.rows import read_rows
from hf_ft.models.feature_hooks import model_inputs

REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """Seconds of one sample: forward and backward through all layers, and forward alone."""

    training: float
    evaluation: float

    def training_seconds(self, bench: Bench, epochs: float) -> float:
        """Of one full fine-tuning with its evaluations."""
        return epochs * (self.training * len(bench.data["train"]) + self.evaluation * len(bench.data["validation"]))

    def test_seconds(self, bench: Bench) -> float:
        return self.evaluation * sum(len(data) for name, data in bench.data.items() if name not in ("train",))


def measure_cost(bench: Bench, batch_size: int, device: str = "cpu") -> Cost:
    """Time full fine-tuning's passes; the model is one of its own."""
    model: Any = bench.load(0, False).to(device)
    data = bench.data["train"]
    size = min(batch_size, len(data))
    batch = bench.collate(read_rows(data, list(range(size))))
    inputs, labels = model_inputs(batch, torch.device(device)), batch["labels"].to(device)

    def forward() -> Any:
        with torch.no_grad():
            return model(**inputs)

    def both() -> None:
        model(**inputs, labels=labels).loss.backward()

    model.train()
    training = _seconds(both, device) / size
    model.eval()
    return Cost(training, _seconds(forward, device) / size)


def _seconds(work: Callable[[], Any], device: str) -> float:
    """The shortest of a few runs, after one that warms up."""
    taken = []
    for _ in range(REPEATS + 1):
        began = now(device)[0]
        work()
        taken.append(now(device)[0] - began)
    return min(taken[1:])
