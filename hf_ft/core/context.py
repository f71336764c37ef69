"""What a strategy may use to look at the data before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_ft.core.options import option, validate
from hf_ft.core.task_loss import TaskLoss
from hf_ft.errors import OptionError


@dataclass(frozen=True)
class State:
    """What a strategy learned by looking at the data once. Saved with the model; JSON and tensors only."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The source data.

    Attributes:
        dataset: as the user gave it.
        batches: up to so many of its samples, the same on every process, as keyword arguments on the device.
    """

    dataset: Any
    batches: Callable[[int], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Context:
    """What ``measure`` may use: capabilities, never the Trainer.

    Attributes:
        batches: a fresh pass over this process's share of the training data, each sample exactly once over all
            processes, as keyword arguments of the model, on its device. Batches of the size on each device are
            dealt out whole, in shuffled order: the same ones on any number of processes.
        reduce: sums a tensor over all processes.
        device: where the model is.
        generator: a CPU generator, seeded alike on every process.
        samples: the training samples by number, without augmentation where the user gave such.
        labels: their classes, (samples,), where they can be told without reading the inputs.
        recipe: how training will be done, for short trainings of one's own.
        described: what the recipe was made of, to tell whether results belong to it.
        frozen_cache: whether and where what is frozen may be kept.
        source: the source data, where there are such.
        folder: where intermediate results may be kept.
        progress: whether to show progress bars.
        rank: which process this is.
        ranks: of how many.
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


@dataclass(frozen=True)
class Recipe:
    """How to train, as the training arguments say it.

    Attributes:
        optimizer: makes one of parameter groups.
        curve: number of steps -> (step -> factor of the rate), the schedule.
        batch_size: samples that run together.
        accumulation: so many of these batches make a step.
        max_grad_norm: gradients are clipped to this norm; 0 for not at all.
        task_loss: the loss of the task.
        computing: the context in which the model computes, such as autocast.
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


@dataclass(frozen=True)
class Samples:
    """Training samples by number.

    Attributes:
        count: how many there are.
        read: reads some of them, by number, as keyword arguments of the model on its device.
    """

    count: int
    read: Callable[[Sequence[int]], dict[str, Any]]


@dataclass(frozen=True)
class FrozenCache:
    """Whether and where to keep what the frozen part of a model computes.

    Raises:
        OptionError: a value that cannot be.
    """

    use: Literal["auto", "always", "never"] = option(
        "auto",
        "auto: where samples are the same each time they are read (some are, to see) and the stage is longer than "
        "an epoch. always: without looking. never: the whole forward pass in every step.",
    )
    memory_gb: float = option(2.0, "Keep so many GB in memory at most; more goes into a file.", range="[0, inf)")
    disk_gb: float = option(20.0, "Write so many GB to that file at most; more is not kept.", range="[0, inf)")
    folder: str | None = option(None, "Where to put it; None for the system's temporary folder.")

    def __post_init__(self) -> None:
        validate(self)
        if self.folder is not None and not Path(self.folder).is_dir():
            raise OptionError(f"FrozenCache.folder={self.folder!r} is no folder: make it, or name another.")
