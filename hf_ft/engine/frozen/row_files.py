"""Memory-mapped files with reserved room, in a temporary folder that the processes of one machine can share."""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # by the file system, or by the C library on its behalf
ZEROS = bytes(2**20)


@dataclass(frozen=True)
class Shared:
    """Files that several processes of a machine map under the same name; one of them creates them."""

    name: str = field(default_factory=lambda: secrets.token_hex(8))
    creates: bool = True


class RowFiles:
    """A folder of memory-mapped files; deleted with this object by the process that created it.

    Args:
        parent: the folder to create it in; None for the system's temporary folder.
    """

    def __init__(self, parent: str | None, shared: Shared) -> None:
        self._creates = shared.creates
        self._folder = Path(parent or tempfile.gettempdir(), f"hf_ft_frozen_{shared.name}")
        if self._creates:
            self._folder.mkdir(mode=0o700)
            self._delete = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def map(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in its own file.

        Raises:
            OSError: if there is no room for it; the folder is then deleted.
        """
        file, size = self._folder / name, math.prod(shape)
        if self._creates:
            try:
                with file.open("wb") as opened:
                    reserve(opened, size * dtype.itemsize)
            except OSError:
                self._delete()
                raise
        return torch.from_file(str(file), shared=True, size=size, dtype=dtype).reshape(shape)


def reserve(file: BinaryIO, size: int) -> None:
    """Extend an empty file to this size, with all its blocks.

    Without them, a full disk shows only when a mapped page is written, and that kills the process by SIGBUS.

    Raises:
        OSError: if there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
    for start in range(0, size, len(ZEROS)):
        file.write(ZEROS[: size - start])
