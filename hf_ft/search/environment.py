"""Errors of the machine rather than of the run on it: a full disk, no memory. The same run may succeed later."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
}
# Libraries pass such errors on only as text: torch, safetensors, SQLite, Arrow, and data loaders whose worker died.
_MESSAGES = re.compile(
    "no space left|quota exceeded|disk is full|disk i/o error|input/output error|read-only file system|"
    "too many open files|can't allocate memory|cannot allocate memory|not enough memory|"
    r"PytorchStreamWriter failed writing|worker \(pid.*killed by signal",
    re.IGNORECASE,
)


def environment_error(error: BaseException) -> BaseException | None:
    """The machine error that an error is, or was caused by; None if there is none.

    Memory of a GPU is not counted: whether it suffices depends on the strategy.
    """
    return next((one for one in _causes(error) if _of_machine(one)), None)


def _of_machine(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno in ERRNOS:
        return True
    return isinstance(error, Exception) and bool(_MESSAGES.search(str(error)))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or during."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
