"""Trace a forward pass: the modules called, in order, with their outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.models.feature_hooks import Batch, run
from hf_ft.models.preserve import evaluating


def module_outputs(model: nn.Module, batch: Batch) -> list[tuple[str, tuple[int, ...]]]:
    """Modules whose output is a single tensor, with its shape, in the order in which their calls end."""
    calls = sorted(_trace(model, batch), key=lambda call: call.end)
    return [(c.name, tuple(c.output.shape)) for c in calls if isinstance(c.output, Tensor)]


@dataclass
class _Call:
    """One call of a module: when it began and ended, and its output."""

    name: str
    begin: int
    end: int = 0
    output: Any = None


def _trace(model: nn.Module, batch: Batch) -> list[_Call]:
    """All module calls of one forward pass in evaluation mode, in the order in which they begin."""
    calls: list[_Call] = []
    open_calls: list[_Call] = []
    clock = iter(range(10**9))

    def enter(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            call = _Call(name, next(clock))
            calls.append(call)
            open_calls.append(call)

        return hook

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        call = open_calls.pop()
        call.end, call.output = next(clock), output

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        with evaluating(model), torch.no_grad():
            run(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return calls
