"""Names of processes, from which others on the same machine can tell that a process is gone."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
from pathlib import Path

_NAME = re.compile(r"([0-9a-f]{12})-(\d+)-(\d+)")


def process_name() -> str:
    """A name of this process that no other has or will have: where it runs, its number, and when it started.

    Only its number if the rest cannot be determined, as on systems other than Linux.
    """
    place, started = _place(), _start(os.getpid())
    return f"{place}-{os.getpid()}-{started}" if place and started else str(os.getpid())


def is_gone(name: str) -> bool:
    """Whether a process has certainly ended; False if it runs, or ran elsewhere and its number means nothing here."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] != _place():
        return False
    number = int(match[2])
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it exists, but belongs to another user
        pass
    started = _start(number)
    return started is not None and started != match[3]  # its number may have been given to another process


@functools.cache
def _place() -> str | None:
    """The machine since it was last started, and the namespace of process numbers: a container has its own.

    The host name alone would not suffice: containers on several machines may share it. It distinguishes copies of a
    virtual machine, which were all started at the same time. None if /proc shows the processes of another namespace.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/pid")
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
    except OSError:
        return None
    return hashlib.sha256(f"{boot}{namespace}{socket.gethostname()}".encode()).hexdigest()[:12]


def _start(number: int) -> str | None:
    """When a process started, in ticks since the machine did; ``0`` if it has ended and its parent has not noticed."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "0" if fields[0] in "ZX" else fields[19]
