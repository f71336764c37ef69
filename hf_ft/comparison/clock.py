"""What a training costs: seconds, and seconds of computing, without evaluations and saving."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback


def now() -> tuple[float, float]:
    """Seconds on the wall, and of computing.

    Computing is the processor time of this process, on all its cores: other work on the machine changes it little. On a
    GPU it is the time on the wall.
    """
    wall = time.perf_counter()
    return wall, wall if torch.cuda.is_available() else time.process_time()


@dataclass
class Clock(TrainerCallback):
    """Runs from its making to the end of training, but for what the Trainer does between epochs.

    Attributes:
        seconds: on the wall.
        compute: seconds of computing.
        paused: seconds on the wall in which it stood.
    """

    seconds: float = 0.0
    compute: float = 0.0
    paused: float = 0.0
    _since: tuple[float, float] = field(default_factory=now)
    _stopped: float | None = None

    def _stop(self) -> None:
        if self._stopped is None:
            wall, compute = now()
            self.seconds += wall - self._since[0]
            self.compute += compute - self._since[1]
            self._stopped = wall

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stopped is not None:
            self._since = now()
            self.paused += self._since[0] - self._stopped
            self._stopped = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()
