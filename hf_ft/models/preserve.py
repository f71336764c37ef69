"""Look at a model or at data without leaving a trace: modes and random states are afterwards as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode; afterwards each in the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def random_states_kept(seed: int | None = None) -> Iterator[None]:
    """Whatever draws random numbers in here, Python's, NumPy's and torch's states are as before.

    Reading data counts as well: augmentations draw from any of the three.

    Args:
        seed: of all three in here.
    """
    kept = random.getstate(), np.random.get_state()
    # False in a forked worker process, which must not touch its parent's CUDA, and need not: it reads data.
    on_cuda = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_cuda else []):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                (torch.manual_seed if on_cuda else torch.default_generator.manual_seed)(seed)
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


@contextlib.contextmanager
def observing(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient, and random states kept."""
    with random_states_kept(), evaluating(*models), torch.no_grad():
        yield
