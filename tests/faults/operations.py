"""Commands that die just before, or within, each of their file operations in turn, and then continue to their end.

Python reports what it opens, renames and deletes to audit hooks; the writers of safetensors, of ``torch.save`` and of
SQLite work outside Python, so their calls are counted instead. Flushes to disk are not counted: they do not change what
a killed process leaves.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import sqlalchemy
import torch

from tests.faults.lasting import FOREIGN
from tests.faults.materials import Materials
from tests.faults.processes import run
from tests.faults.results import WRONG, Case, Outcome
from tests.faults.workloads import BEST, SAVING, Wholes, Workload, judged

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
WRITES = ("open", "safetensors", "torch.save")
PROCESS = re.compile(r"\b\d{2,}(?=-|/|$)")


def workloads(materials: Materials) -> list[Workload]:
    """A comparison, and a training run that saves, deletes old checkpoints, and loads the best."""
    saves = materials.train("--strategy", "l2_sp", "--overwrite", *SAVING, *BEST, steps=4)
    return [Workload("compare", tuple(materials.compare()), ()), Workload("checkpoints", tuple(saves))]


def cases(materials: Materials, wholes: Wholes, scratch: Path) -> Iterator[Case]:
    """A case for each file operation, and one within each that writes."""
    for workload in workloads(materials):
        operations = _operations(workload, scratch)
        points = [(index, within) for index, what in enumerate(operations) for within in (False, True)]
        points = [(index, within) for index, within in points if not within or operations[index][0] in WRITES]
        for number, (index, within) in enumerate(points):

            def made(folder: Path, workload: Workload = workload, at: Any = (index, within)) -> Outcome:
                return _died(workload, wholes, folder, _operations(workload, scratch), *at)

            yield Case("operations", workload.name, number, made)


def _operations(workload: Workload, scratch: Path) -> list[tuple[str, str]]:
    """Every file operation of an undisturbed run: which operation, on which file."""
    return _counted(workload, scratch)


@cache
def _counted(workload: Workload, scratch: Path) -> list[tuple[str, str]]:
    folder = scratch / f"operations of {workload.name}"
    (folder / "out").mkdir(parents=True)
    _put_foreign(workload, folder)
    log = folder / "operations"
    ended = run(workload.command, folder, first=lambda: Counter(folder / "out", log).start())
    if ended.code != 0:
        raise RuntimeError(f"{workload.name} ended with {ended.code}:\n{ended.err[-2000:]}")
    return [tuple(json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines()]


def _put_foreign(workload: Workload, folder: Path) -> None:
    """Put the user's files where the command accepts a folder with such files: at once, or after it has begun."""
    if workload.name == "compare" and not (folder / "out" / ".comparison").is_dir():
        return
    for name in FOREIGN:
        file = folder / "out" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine", encoding="utf-8")


def _died(
    workload: Workload, wholes: Wholes, folder: Path, operations: list[tuple[str, str]], index: int, within: bool
) -> Outcome:
    what, file = operations[index]
    where = f"{'within' if within else 'before'} operation {index} of {len(operations)}, {what} {file}: "
    out = folder / "out"
    out.mkdir()
    _put_foreign(workload, folder)
    ended = run(workload.command, folder, first=lambda: Counter(out, None, index, within).start())
    if not ended.killed:
        return Outcome(WRONG, f"{where}it did not die there, but ended with {ended.code}: {ended.err[-300:]}")
    _put_foreign(workload, folder)
    foreign = [out / name for name in FOREIGN if (out / name).exists()]
    ended = run(workload.goes_on(folder), folder)
    lost = [file.name for file in foreign if not file.is_file() or file.read_text(encoding="utf-8") != "mine"]
    if lost:
        return Outcome(WRONG, f"{where}{', '.join(lost)} of the user is lost", 1)
    return judged(ended, wholes.get(workload), folder, 1, where)


class Counter:
    """Counts the file operations of this process inside a folder, and dies at one of them.

    Args:
        log: where each operation is recorded.
        at: number of the operation before which it dies.
        within: die within it instead: the file exists and is empty.
    """

    def __init__(self, folder: Path, log: Path | None, at: int | None = None, within: bool = False) -> None:
        self.folder, self.at, self.within, self.count = str(folder), at, within, 0
        self.log = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def start(self) -> None:
        """Count from now on; counting never stops."""
        safetensors.torch.serialize_file = self._counted(
            "safetensors", safetensors.torch.serialize_file, lambda tensors, file, *rest: file
        )
        torch.save = self._counted("torch.save", torch.save, lambda content, file, *rest: file)
        sqlalchemy.event.listen(sqlalchemy.engine.Engine, "commit", self._commits)
        sys.addaudithook(self._hook)

    def happens(self, what: str, path: Any, directory: int = -1) -> None:
        """Count one operation, if it is inside the folder."""
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.fsdecode(path)
        if not os.path.isabs(name):
            base = os.getcwd() if directory < 0 else os.readlink(f"/proc/self/fd/{directory}")
            name = os.path.join(base, name)
        if os.path.commonpath([self.folder, os.path.abspath(name)]) != self.folder:
            return
        if self.log is not None:
            shown = PROCESS.sub("PROCESS", os.path.relpath(name, self.folder))
            os.write(self.log, json.dumps([what, shown]).encode() + b"\n")
        if self.count == self.at:
            if self.within and not os.path.isdir(name):
                self.at = None  # what it opens now is not an operation of the command
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.happens(event, path)
        elif event in CHANGES:
            directories = [item for item in arguments[1:] if isinstance(item, int)]
            self.happens(event, arguments[0], directories[0] if directories and event != "os.mkdir" else -1)

    def _counted(self, what: str, call: Callable[..., Any], named: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            self.happens(what, named(*arguments, *more.values()))
            return call(*arguments, **more)

        return counted

    def _commits(self, connection: Any) -> None:
        self.happens("commit", connection.engine.url.database)
