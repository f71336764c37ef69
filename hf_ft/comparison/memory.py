"""The peak of memory during a piece of work."""

from __future__ import annotations

import ctypes
import gc
import threading
from contextlib import suppress
from types import TracebackType

import psutil
import torch

MB = 2**20
EVERY = 0.02  # seconds between two looks


class PeakMemory:
    """Measures while it is entered: on a GPU what tensors took at most, else what the process grew by at most.

    Args:
        device: kind of device that trains, such as ``cpu`` or ``cuda``.

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
            with suppress(OSError, AttributeError):  # what earlier work freed, the allocator may still hold
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
