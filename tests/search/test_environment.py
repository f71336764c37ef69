"""Which errors are caused by the machine."""

import errno

import pytest
import torch

from hf_ft.search.environment import environment_error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError(),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/1"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_of_the_machine(error):
    assert environment_error(error) is error
    with pytest.raises(ValueError) as raised:
        try:
            raise error
        except type(error) as cause:
            raise ValueError("could not save") from cause
    assert environment_error(raised.value) is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ValueError("nan"),
    ],
)
def test_of_what_ran(error):
    assert environment_error(error) is None
