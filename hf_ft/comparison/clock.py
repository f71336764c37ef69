"""What a training costs: seconds, and seconds of computing, without evaluations and saving."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback


def now(device: str = "cpu") -> tuple[float, float]:
    """Seconds on the wall, and of computing.

    Computing is the processor time of this process, on all its cores: other work on the machine changes it little. On
    another device than the CPU it is the time on the wall, once that has done what it was given.

    Args:
        device: kind of device, such as ``cpu`` or ``cuda``.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    wall = time.perf_counter()
    return wall, time.process_time() if device == "cpu" else wall


@dataclass
class Clock(TrainerCallback):
    """Runs from its making to the end of training, but for what the Trainer does between epochs.

    Attributes:
        device: kind of device that trains.
        seconds: on the wall.
        compute: seconds of computing.
        paused: seconds on the wall in which it stood.
    """

    device: str = "cpu"
    seconds: float = 0.0
    compute: float = 0.0
    paused: float = 0.0
    _since: tuple[float, float] = (0.0, 0.0)
    _stopped: float | None = None

    def __post_init__(self) -> None:
        self._since = now(self.device)

    def _stop(self) -> None:
        if self._stopped is None:
            wall, compute = now(self.device)
            self.seconds += wall - self._since[0]
            self.compute += compute - self._since[1]
            self._stopped = wall

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stopped is not None:
            self._since = now(self.device)
            self.paused += self._since[0] - self._stopped
            self._stopped = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()
