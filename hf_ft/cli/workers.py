"""``--workers N``: processes that run the same command, share its jobs, and end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from hf_ft.cli.console import say
from hf_ft.cli.cores import THREADS, cores, shared
from hf_ft.errors import OptionError

STARTED = "HF_FT_WORKER"  # set in processes that end with the one that started them
ENDING = (signal.SIGINT, signal.SIGTERM)
GRACE = 10.0  # seconds that a worker has to give back its job


@dataclass
class WorkerFlags:
    """The flag of commands whose jobs several processes can share."""

    workers: int = field(
        default=1,
        metadata={"help": "processes that share the training runs: each gets a GPU or, on a CPU, a share of the cores"},
    )


def check_workers(number: int, gpus: int) -> None:
    """Check the number of workers.

    Args:
        gpus: number of GPUs to train on; 0 for the CPU.

    Raises:
        OptionError: if there are none, more than GPUs, or others that a launcher has started.
    """
    if number < 1:
        raise OptionError(f"--workers {number}: there must be at least 1. Leave it out for one.")
    if number == 1:
        return
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise OptionError(
            f"--workers {number}, but a launcher has started {launched} processes (WORLD_SIZE), each of which is a "
            "worker: leave --workers out, or start the command without the launcher."
        )
    if THREADS not in os.environ:  # see take_share
        raise OptionError(
            f"workers: {number} in a file comes too late: torch has already started its threads. Give --workers "
            f"{number} on the command line."
        )
    if gpus and number > gpus:
        raise OptionError(
            f"--workers {number} exceeds the number of GPUs, {gpus}: each worker uses one. Set --workers {gpus}, or "
            "add --use_cpu true."
        )
    if not gpus and number > cores():
        say(f"note: --workers {number} exceeds the number of cores, {cores()}: more workers take longer", error=True)


def same_command(command: str, arguments: Sequence[str]) -> list[str]:
    """The command line of another worker."""
    return [sys.executable, "-m", "hf_ft", command, *arguments, "--workers", "1"]


@contextmanager
def other_workers(number: int, command: Sequence[str], gpus: Sequence[str]) -> Iterator[Others]:
    """Start all workers but this process, and end them on exit.

    Args:
        number: number of workers, this process included.
        command: see :func:`same_command`.
        gpus: GPUs as in ``CUDA_VISIBLE_DEVICES``, one for each worker; empty for the CPU.
    """
    if number == 1:
        yield Others(())
        return
    others = Others(())
    try:
        threads = shared(number)[THREADS]
        each = "a GPU each" if gpus else f"{threads} thread{'s' if threads != '1' else ''} each"
        say(f"workers: {number}, {each}\n")
        others = Others([_start(command, index, number, gpus) for index in range(1, number)])
        yield others
    finally:
        others.end()


def _start(command: Sequence[str], index: int, number: int, gpus: Sequence[str]) -> subprocess.Popen[str]:
    told = {**shared(number), "RANK": str(index), STARTED: str(index + 1), "PYTHONUNBUFFERED": "1"}
    told |= {"CUDA_VISIBLE_DEVICES": gpus[index]} if gpus else {}
    # It imports the same package as this process; `python -m` alone might not: it looks in the current folder first.
    told |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        command,
        env={**os.environ, **told},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # a terminal would send Ctrl-C to it, too: it would be interrupted while it cleans up
    )


class Others:
    """The other workers.

    Nothing is written to their standard input, but it closes when this process ends, even by kill -9; then they end,
    too.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self.processes, self._ending = processes, False
        self._readers = [
            threading.Thread(target=self._follow, args=(process, f"worker {number}"), daemon=True)
            for number, process in enumerate(processes, 2)
        ]
        for reader in self._readers:
            reader.start()

    def _follow(self, process: subprocess.Popen[str], name: str) -> None:
        """Print what a worker prints, and how it ended if it failed."""
        for line in process.stdout or ():
            if not self._ending:
                say(f"{name}: {line.rstrip()}", error=True)
        code = process.wait()
        if code and not self._ending:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            say(f"note: {name} {how}; the others take over its work", error=True)

    def wait(self) -> bool:
        """Wait until all have ended by themselves; return whether there are any."""
        for process in self.processes:
            process.wait()
        return bool(self.processes)

    def end(self) -> None:
        """End all that are still running. Each hands back its job, which then counts as interrupted, not as failed."""
        self._ending = True
        with _uninterrupted():  # one that hangs would be left behind
            for process in self.processes:
                process.terminate()
            deadline = time.monotonic() + GRACE
            for process in self.processes:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                if process.stdin is not None:  # not before it has ended: a second interrupt would disturb it
                    process.stdin.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore further interrupts: whoever presses Ctrl-C once often does so again."""
    if threading.current_thread() is not threading.main_thread():  # no other receives any
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """If another worker has started this process, be interrupted when that ends: as by Ctrl-C, but only once."""
    if os.environ.pop(STARTED, None) is None:
        return
    interrupt_once(*ENDING)
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    with suppress(OSError):
        while os.read(0, 1024):
            pass
    # Sent to the main thread: a signal to the process need not wake it from a system call.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(GRACE)  # as Others.end gives it: no code that swallows the interrupt lets it train on alone
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt_once(*signals: int) -> None:
    """Let these signals interrupt as Ctrl-C does; once one has come, they are ignored, and do not disturb what ends."""

    def interrupt(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, interrupt)
