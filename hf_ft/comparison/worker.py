"""Worker processes that share a comparison."""

from __future__ import annotations

import os

import torch

from hf_ft.errors import OptionError

LAUNCHED = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    number = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(number)))).split(",")
    return named[:number]  # an entry that is not a GPU hides those after it


def become_worker() -> None:
    """Make each process of ``accelerate launch`` a worker with one device; training runs are shared, never split.

    Raises:
        OptionError: if there are more processes than GPUs.
    """
    workers, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    devices = visible_gpus()
    if devices:
        if local >= len(devices):
            raise OptionError(
                f"--num_processes {workers} exceeds the number of GPUs, {len(devices)}: each worker uses one."
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local]
    for name in LAUNCHED:  # otherwise each training would be distributed over all processes
        os.environ.pop(name, None)
