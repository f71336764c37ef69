"""The cost of a training run: seconds, and work in floating-point operations, without evaluations and saving."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from hf_ft.comparison.task import Bench
from hf_ft.core.task_loss import TaskLoss
from hf_ft.data.rows import read_rows
from hf_ft.engine.work import Work
from hf_ft.models.feature_hooks import model_inputs


def now(device: str = "cpu") -> tuple[float, float]:
    """Current wall-clock time and compute time, in seconds.

    On the CPU, compute time is the processor time of this process over all cores, which other work on the machine
    hardly affects. On other devices it is wall-clock time after the device has synchronised.

    Args:
        device: type of device, such as ``cpu`` or ``cuda``.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    wall = time.perf_counter()
    return wall, time.process_time() if device == "cpu" else wall


@dataclass
class Clock(TrainerCallback):
    """Measures the time from its creation to the end of training, paused while the Trainer works between epochs.

    Attributes:
        device: type of the training device.
        work: also counts the work during that time, if given.
        seconds: wall-clock seconds.
        compute: compute seconds.
        paused: wall-clock seconds while paused.
    """

    device: str = "cpu"
    work: Work | None = None
    seconds: float = 0.0
    compute: float = 0.0
    paused: float = 0.0
    _since: tuple[float, float, float] = (0.0, 0.0, 0.0)
    _stopped: float | None = None

    def __post_init__(self) -> None:
        self._since = self._now()

    def _now(self) -> tuple[float, float, float]:
        return (*now(self.device), self.work.total if self.work is not None else 0.0)

    def _stop(self) -> None:
        if self._stopped is None:
            wall, compute, work = self._now()
            self.seconds += wall - self._since[0]
            self.compute += compute - self._since[1]
            if self.work is not None:
                self.work.trained += work - self._since[2]
            self._stopped = wall

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stopped is not None:
            self._since = self._now()
            self.paused += self._since[0] - self._stopped
            self._stopped = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()


REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """Seconds per sample: for forward and backward passes through all layers, and for a forward pass alone."""

    training: float
    evaluation: float

    def training_seconds(self, bench: Bench, epochs: float) -> float:
        """Time of one full fine-tuning run including its evaluations."""
        return epochs * (self.training * len(bench.data["train"]) + self.evaluation * len(bench.data["validation"]))

    def test_seconds(self, bench: Bench) -> float:
        return self.evaluation * sum(len(data) for name, data in bench.data.items() if name not in ("train",))


def measure_cost(bench: Bench, batch_size: int, device: str = "cpu") -> Cost:
    """Time the passes of full fine-tuning on a separate model."""
    model: Any = bench.load(0, False).to(device)
    data = bench.data["train"]
    size = min(batch_size, len(data))
    batch = bench.collate(read_rows(data, list(range(size))))
    inputs, labels = model_inputs(batch, torch.device(device)), batch["labels"].to(device)

    def forward() -> Any:
        with torch.no_grad():
            return model(**inputs)

    def both() -> None:
        loss, _ = TaskLoss()(model, {**inputs, "labels": labels})
        assert loss is not None
        loss.backward()

    model.train()
    training = _seconds(both, device) / size
    model.eval()
    return Cost(training, _seconds(forward, device) / size)


def _seconds(work: Callable[[], Any], device: str) -> float:
    """The shortest of several runs, after one warm-up run."""
    times = []
    for _ in range(REPEATS + 1):
        began = now(device)[0]
        work()
        times.append(now(device)[0] - began)
    return min(times[1:])


MB = 2**20
EVERY = 0.02  # seconds between two measurements


class PeakMemory:
    """Context manager that measures peak memory: of tensors on a GPU, otherwise the growth of the process.

    Args:
        device: type of the training device, such as ``cpu`` or ``cuda``.

    Attributes:
        mb: the peak, in MB of 2**20 bytes.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.mb, self._cuda = 0.0, device == "cuda"
        self._start = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            gc.collect()
            with suppress(OSError, AttributeError):  # the allocator may still hold memory freed earlier
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            self._start = _resident()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self.mb = torch.cuda.max_memory_allocated() / MB
        else:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        while True:
            self.mb = max(self.mb, _resident() - self._start)
            if self._done.wait(EVERY):
                return


def _resident() -> float:
    return psutil.Process().memory_info().rss / MB
