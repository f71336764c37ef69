"""Inspect a model or data without side effects: modes and RNG states are restored on exit."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode; restore each module's mode on exit."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in models:
            forget_evaluation(model)
        for module, mode in modes:
            module.training = mode


def acts_on_train(module: nn.Module) -> bool:
    """Whether a module does something special when it is put in train mode.

    Levit's attention, for example, keeps its biases between evaluation passes, and drops them in train mode.
    """
    return type(module).train not in (nn.Module.train, PreTrainedModel.train)


def forget_evaluation(model: nn.Module) -> None:
    """Drop what modules keep between evaluation passes: it is outdated as soon as parameters change."""
    acting = [module for module in model.modules() if acts_on_train(module)]
    modes = [(inner, inner.training) for module in acting for inner in module.modules()]
    for module in acting:
        module.train()
    for inner, mode in modes:
        inner.training = mode


@contextlib.contextmanager
def random_states_kept(seed: int | None = None) -> Iterator[None]:
    """Restore the RNG states of Python, NumPy and torch on exit.

    Wrap data loading as well: augmentations draw from any of the three.

    Args:
        seed: seeds all three on entry.
    """
    states = random.getstate(), np.random.get_state()
    # False in a forked worker process, which must not touch its parent's CUDA and only reads data anyway.
    on_cuda = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_cuda else []):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                (torch.manual_seed if on_cuda else torch.default_generator.manual_seed)(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def random_states() -> tuple[Any, ...]:
    """The RNG states of Python, NumPy and torch: equal before and after code that draws no random numbers."""
    _, numbers, position, *rest = np.random.get_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    generators = [state.numpy().tobytes() for state in (torch.get_rng_state(), *on_cuda)]
    return random.getstate(), np.asarray(numbers).tobytes(), position, *rest, *generators


@contextlib.contextmanager
def observing(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; RNG states are restored on exit."""
    with random_states_kept(), evaluating(*models), torch.no_grad():
        yield


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers on exit, such as running statistics that a pass in train mode has moved."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:  # all of them: BatchNorm moves its statistics without a new version
                buffer.copy_(value)


@contextlib.contextmanager
def precision_kept(model: nn.Module) -> Iterator[None]:
    """Restore the tensors of the model on exit, where ``model.to(dtype)`` put rounded ones in their place."""
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, held in buffers:
            module._buffers.update(held)


@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Like :func:`observing`; whatever modules set on themselves meanwhile is also undone.

    Some change permanently with the inputs that they see: BigBird replaces its attention after a short text.
    """
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in (module for model in models for module in model.modules()):
        own = vars(module)
        kept += [(held, dict(held)) for held in (*(value for value in own.values() if type(value) is dict), own)]
    buffers = [(buffer, buffer._version, buffer.clone()) for model in models for buffer in model.buffers()]
    try:
        with observing(*models):
            yield
    finally:
        for held, before in kept:
            held.clear()
            held.update(before)
        for buffer, version, value in buffers:
            if buffer._version != version:
                buffer.copy_(value)
