"""The context in which a strategy measures the data before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from hf_ft.core.options import option, validate
from hf_ft.core.task_loss import TaskLoss
from hf_ft.errors import OptionError


@dataclass(frozen=True)
class State:
    """The result of a strategy's measurement of the data. Saved with the model; JSON and tensors only."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The source data.

    Attributes:
        dataset: the data set as passed by the user.
        batches: up to the given number of its samples, the same on every process, as keyword arguments of the model
            on its device.
    """

    dataset: Any
    batches: Callable[[int], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Context:
    """Capabilities available to ``measure``; never the Trainer itself.

    Attributes:
        batches: a fresh pass over this process's share of the training data, each sample exactly once across all
            processes, as keyword arguments of the model on its device. Per-device batches are distributed whole, in
            shuffled order, so that they are the same for any number of processes.
        reduce: sums a tensor over all processes.
        device: device of the model.
        generator: a CPU generator with the same seed on every process.
        samples: training samples by index, without augmentation if the user provided such a data set.
        labels: their classes, (samples,), if known without reading the inputs.
        groups: numbers of the groups that they belong to, (samples,), which are held out as a whole; None if there are
            none.
        recipe: the training recipe, for a strategy's own short training runs.
        described: settings from which the recipe was built, to check whether results belong to it.
        frozen_cache: whether and where to store outputs of frozen parts.
        source: the source data, if any.
        folder: folder for intermediate results.
        progress: whether to show progress bars.
        rank: index of this process.
        ranks: number of processes.
    """

    batches: Callable[[], Iterator[dict[str, Any]]]
    reduce: Callable[[Tensor], Tensor]
    device: torch.device
    generator: torch.Generator
    samples: Samples
    labels: np.ndarray | None
    recipe: Recipe
    described: Mapping[str, Any]
    frozen_cache: FrozenCache
    source: Source | None = None
    folder: Path | None = None
    progress: bool = True
    rank: int = 0
    ranks: int = 1
    groups: np.ndarray | None = None


@dataclass(frozen=True)
class Recipe:
    """The training recipe given by the training arguments.

    Attributes:
        optimizer: creates an optimizer from parameter groups.
        curve: number of steps -> (step -> factor of the rate), the schedule.
        batch_size: number of samples in a micro-batch.
        accumulation: number of micro-batches per step.
        max_grad_norm: norm to which gradients are clipped; 0 disables clipping.
        task_loss: the task loss.
        computing: context manager for the model's computations, such as autocast.
        scaler: creates a gradient scaler, which does nothing unless these computations run in float16.
        epochs: length of the training in epochs.
    """

    optimizer: Callable[[list[dict[str, Any]]], Optimizer]
    curve: Callable[[int], Callable[[int], float]]
    learning_rate: float
    weight_decay: float = 0.0
    batch_size: int = 8
    accumulation: int = 1
    max_grad_norm: float = 1.0
    task_loss: TaskLoss = field(default_factory=TaskLoss)
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: Callable[[], GradScaler] = partial(GradScaler, enabled=False)
    epochs: float = 1.0


@dataclass(frozen=True)
class Samples:
    """Training samples by index.

    Attributes:
        count: number of samples.
        read: reads samples by index, as keyword arguments of the model on its device.
    """

    count: int
    read: Callable[[Sequence[int]], dict[str, Any]]


@dataclass(frozen=True)
class FrozenCache:
    """Whether and where to store the outputs of the model's frozen part.

    Raises:
        OptionError: for an invalid value.
    """

    use: Literal["auto", "always", "never"] = option(
        "auto",
        "auto: cache if samples are the same each time they are read (checked on a few) and the stage is longer than "
        "an epoch. always: cache without checking. never: run the whole forward pass in every step.",
    )
    memory_gb: float = option(2.0, "Maximum number of GB kept in memory; the rest goes to a file.", range="[0, inf)")
    disk_gb: float = option(
        20.0, "Maximum number of GB written to that file; the rest is not cached.", range="[0, inf)"
    )
    folder: str | None = option(None, "Folder for the file; None for the system's temporary folder.")

    def __post_init__(self) -> None:
        validate(self)
        if self.folder is not None and not Path(self.folder).is_dir():
            raise OptionError(f"FrozenCache.folder={self.folder!r} is not a folder: create it, or choose another.")
