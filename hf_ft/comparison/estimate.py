"""What a comparison will take, told before it starts: a few passes of one batch are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_ft.comparison.contenders import Bench
from hf_ft.row_cache import read_rows
from hf_ft.sampling import model_inputs

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


def measure_cost(bench: Bench, batch_size: int) -> Cost:
    """Time full fine-tuning's passes; the model is one of its own."""
    model = bench.load(0, False)
    if torch.cuda.is_available():
        model = model.cuda()
    data = bench.data["train"]
    size = min(batch_size, len(data))
    inputs = model_inputs(bench.collate(read_rows(data, list(range(size)))), next(model.parameters()).device)
    labels = bench.collate(read_rows(data, list(range(size))))["labels"].to(next(model.parameters()).device)

    def forward() -> Any:
        with torch.no_grad():
            return model(**inputs)

    def both() -> None:
        model(**inputs, labels=labels).loss.backward()

    model.train()
    training = _seconds(both) / size
    model.eval()
    return Cost(training, _seconds(forward) / size)


def _seconds(work: Callable[[], Any]) -> float:
    """The shortest of a few runs, after one that warms up."""
    taken = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
