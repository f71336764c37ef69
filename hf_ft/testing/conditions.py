"""The conditions under which the laws are checked: by default on the CPU, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch


def _nothing(trainer: Any) -> None:
    pass


@dataclass(frozen=True)
class Conditions:
    """The settings of all tiny training runs.

    Attributes:
        arguments: training arguments, such as ``{"use_cpu": False, "bf16": True}``.
        slack: factor of the laws' tolerances, for arithmetic that rounds more than float32 on a CPU.
        prepare: called with each trainer before it trains.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    slack: float = 1.0
    prepare: Callable[[Any], None] = _nothing

    @property
    def device(self) -> torch.device:
        """Where hand-written loops compute: like a Trainer with these arguments."""
        there = not self.arguments.get("use_cpu", True) and torch.accelerator.is_available()
        return (torch.accelerator.current_accelerator() if there else None) or torch.device("cpu")


USUAL = Conditions()
_PRESENT: ContextVar[Conditions] = ContextVar("conditions", default=USUAL)


def conditions() -> Conditions:
    """The current conditions."""
    return _PRESENT.get()


@contextmanager
def under(
    arguments: Mapping[str, Any], slack: float = 1.0, prepare: Callable[[Any], None] = _nothing
) -> Iterator[None]:
    """Check laws under other conditions, such as on a GPU: see :class:`Conditions`.

    >>> with under({"use_cpu": False, "bf16": True}, slack=500):
    ...     check_strategy(MyConfig())
    """
    token = _PRESENT.set(Conditions(arguments, slack, prepare))
    try:
        yield
    finally:
        _PRESENT.reset(token)
