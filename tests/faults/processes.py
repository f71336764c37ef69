"""``hf-ft`` commands in separate processes, forked from one that has imported everything so that they start fast."""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LIMIT = 60.0  # seconds until a command counts as hanging
MEMORY = 24 * 2**30  # of address space: a command that requests more gets a MemoryError, and the machine stays usable
LIBRARIES = ("datasets", "matplotlib.pyplot", "optuna", "peft", "sklearn.svm", "torch._dynamo", "transformers.trainer")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit status, negative if a signal ended it; None if it hung.
        killed: whether it was killed as intended.
    """

    code: int | None
    killed: bool
    seconds: float
    out: str
    err: str


def preload() -> None:
    """Import what commands need once, offline and with one thread."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
    import optuna
    import torch
    from transformers.utils import logging

    import hf_ft
    from hf_ft.core.config import strategies
    from tests import quick

    for name in LIBRARIES:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(hf_ft.__path__, "hf_ft."):
        if module.name != "hf_ft.__main__":
            importlib.import_module(module.name)
    strategies()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    quick.set_up()
    optuna.storages.RDBStorage("sqlite://")  # reads its migration scripts once
    gc.collect()
    gc.freeze()


def run(
    arguments: Sequence[str],
    folder: Path,
    *,
    kill_after: float | None = None,
    first: Callable[[], None] = lambda: None,
    limit: float = LIMIT,
) -> Ended:
    """Run one command in a folder, in its own process group.

    Args:
        kill_after: seconds until it is killed with SIGKILL.
        first: called in the new process before the command.
        limit: seconds until it counts as hanging.
    """
    logs = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
    began = time.monotonic()
    process = os.fork()
    if not process:
        _command(arguments, folder, logs, first, limit)
    with suppress(OSError):  # the child does it too, whichever is first
        os.setpgid(process, process)
    ended = _ends(process, limit if kill_after is None else kill_after)
    with suppress(ProcessLookupError):  # including the processes it started
        os.killpg(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    seconds = time.monotonic() - began
    out, err = (log.read_text(encoding="utf-8", errors="replace") for log in logs)
    hung = not ended and kill_after is None
    killed = code == -signal.SIGKILL and not hung
    return Ended(None if hung else code, killed, seconds, out, err)


def _ends(process: int, seconds: float) -> bool:
    """Whether a process ends within this many seconds."""
    handle = os.pidfd_open(process)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def _command(
    arguments: Sequence[str], folder: Path, logs: Sequence[Path], first: Callable[[], None], limit: float
) -> None:
    """Run the command in the new process; does not return."""
    code = 1
    try:
        with suppress(OSError):
            os.setpgid(0, 0)
        signal.alarm(int(2 * limit) + 1)  # in case its parent is killed
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for stream, log in enumerate(logs, 1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
        os.chdir(folder)
        code = _called(arguments, folder, first)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _called(arguments: Sequence[str], folder: Path, first: Callable[[], None]) -> int:
    import datasets

    from hf_ft.cli import main

    datasets.config.HF_DATASETS_CACHE = folder.with_name(f"{folder.name}.cache")
    sys.argv = ["hf-ft", *arguments]
    first()
    return main(list(arguments))
