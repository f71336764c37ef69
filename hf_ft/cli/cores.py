"""Cores: the share of each of several workers, and whether a training run would compete for them with others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hf_ft.cli.console import say

THREADS, POLICY = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
CROWDED = 1.25  # threads per core: fewer than one too many for four cores cost little


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1


def shared(workers: int) -> dict[str, str]:
    """The environment variables of each of this many workers; those that the user has set are kept.

    A thread that waits for the others of its team keeps its core busy, unless the policy is passive. Where others need
    that core, and the team waits for one of them in turn, most of the time is lost.
    """
    values = {THREADS: str(max(1, cores() // workers)), POLICY: "PASSIVE"}
    return {name: os.environ.get(name, value) for name, value in values.items()}


def take_share(arguments: Sequence[str]) -> None:
    """Take this process's share of the cores if the command line asks for several workers.

    Must be called before torch is imported, which reads the environment only once.
    """
    words = [part for word in arguments for part in word.split("=", 1)]
    for flag, value in zip(words, words[1:], strict=False):
        if flag == "--workers" and value.isdecimal() and int(value) > 1:
            os.environ.update(shared(int(value)))


def load() -> float:
    """Threads of all processes that want a core: over the last minute or, on Linux, at this moment if that is fewer.

    A training that has just ended still counts in the former.
    """
    try:
        wanted = os.getloadavg()[0]
    except (AttributeError, OSError):  # no such thing on Windows
        return 0.0
    with suppress(OSError, ValueError, IndexError):
        running = Path("/proc/loadavg").read_text(encoding="ascii").split()[3]
        wanted = min(wanted, int(running.partition("/")[0]) - 1.0)  # this thread is one of them
    return max(0.0, wanted)


def crowding(threads: int, load: float, machine: int, environment: Mapping[str, str]) -> str:
    """The warning if a training run would compete for cores; empty if it would not, or if nothing is left to set.

    Args:
        threads: threads of the training run.
        load: threads of others that want a core.
        machine: cores of the machine, which the load is about.
    """
    passive = environment.get(POLICY, "").upper() == "PASSIVE"
    if threads == 1 or passive or load + threads <= CROWDED * machine:
        return ""
    return (
        f"the machine is busy: its load is {load:.1f} on {machine} cores, and this adds {threads} threads. Training "
        "runs that compete for cores can take many times as long: wait for the others, or start each with "
        f"{THREADS}={max(1, round(machine - load))} {POLICY}=PASSIVE."
    )


def warn_if_crowded(threads: int) -> None:
    """Warn if a training run on the CPU with this many threads would compete with others for cores."""
    text = crowding(threads, load(), os.cpu_count() or 1, os.environ)
    if text:
        say(f"note: {text}", error=True)
