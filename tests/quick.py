"""Makes tests quick without affecting what they test: they wait neither for the disk nor for idle workers."""

import functools
import gc
import os
from types import SimpleNamespace
from typing import Any

import sqlalchemy
import torch
from accelerate.utils import imports, memory
from optuna.storages._rdb.storage import _VersionManager
from torch.utils.data import _utils

from hf_ft.comparison import cost


def set_up() -> None:
    gc.set_threshold(10_000, 20, 20)  # instead of 700, 10, 10: training creates many objects, but few cycles
    # A data loader that is collected as part of a cycle, as a Trainer's is, waits this long per worker; default: 5 s.
    _utils.MP_STATUS_CHECK_INTERVAL = 0.2
    # Each training run ends with a full collection, which takes as long as training a tiny model for some steps. The
    # automatic collections are enough here.
    memory.gc = cost.gc = SimpleNamespace(collect=lambda: gc.collect(1))
    # accelerate looks for a package in every step, and torch keeps a stack trace of every seed for absent devices.
    imports._is_package_available = functools.cache(imports._is_package_available)
    for devices in (torch.cuda, torch.xpu, torch.mtia):
        if not devices.is_available():
            devices._lazy_call = lambda *_, **__: None
    torch.nn.Module.named_modules = _named_modules
    os.fsync = lambda _: None  # as below: a killed process does not lose what it has written
    _read_the_migrations_once()
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", _not_synchronous)


def _named_modules(module: Any, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
    """The same modules in the same order; torch passes each one through a generator per level above it."""
    memo = set() if memo is None else memo
    left = [(prefix, module)]
    while left:
        name, inner = left.pop()
        if inner in memo:
            continue
        if remove_duplicate:
            memo.add(inner)
        yield name, inner
        lead = f"{name}." if name else ""
        left += [(lead + key, child) for key, child in reversed(inner._modules.items()) if child is not None]


def _read_the_migrations_once() -> None:
    """Optuna compiles all migration scripts for older databases, twice for each database it opens."""
    read, kept = _VersionManager._create_alembic_script, []

    def once(manager: _VersionManager) -> Any:
        if not kept:
            kept.append(read(manager))
        return kept[0]

    _VersionManager._create_alembic_script = once


def _not_synchronous(connection: Any, _: Any) -> None:
    """Trials need not survive a power failure; what a killed process has committed is kept in any case."""
    if type(connection).__module__ == "sqlite3":
        connection.execute("PRAGMA synchronous=OFF")
