"""One training at a time in an output folder: two would mix their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from hf_ft.engine.checkpoint_folders import remove_incomplete
from hf_ft.errors import OptionError
from hf_ft.processes import process_name

LOCK = "_training.lock"  # the Trainer pushes no file whose name starts with an underscore


@contextmanager
def alone_in(folder: Path, saves: bool, accelerator: Accelerator) -> Iterator[str]:
    """Hold a folder for one training, on all its ranks, and delete what killed processes left incomplete there.

    The lock is released when the process ends, however it ends.

    Args:
        saves: whether this rank writes checkpoints; only such ranks take the lock.

    Yields:
        The name of the first rank's process.

    Raises:
        OptionError: on every rank, if another training holds the folder.
    """
    lock = FileLock(folder / LOCK)
    free = not saves or _taken(lock, folder)
    try:
        if not accelerator.gather(torch.tensor([free], device=accelerator.device)).all():
            raise OptionError(
                f"output_dir={str(folder)!r} is in use by another training: wait until it ends, or choose another one."
            )
        if saves:
            remove_incomplete(folder)
        yield broadcast_object_list([process_name()])[0]
    finally:
        if lock.is_locked:
            with suppress(PermissionError):  # on Windows, where releasing deletes it
                (folder / LOCK).unlink(missing_ok=True)
            lock.release()


def _taken(lock: FileLock, folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
