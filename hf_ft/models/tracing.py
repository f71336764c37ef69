"""Trace a forward pass: the modules called, in order, with their outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from hf_ft.models.feature_hooks import Batch, run
from hf_ft.models.preserve import evaluating


@dataclass
class _Call:
    """One call of a module: when it began and ended, its output, and the version of the output's first tensor then."""

    name: str
    begin: int
    end: int = 0
    output: Any = None
    version: int = 0

    @property
    def first(self) -> Tensor | None:
        """The first tensor of the output."""
        return next((leaf for leaf in tree_flatten(self.output)[0] if isinstance(leaf, Tensor)), None)


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
        call.version = 0 if call.first is None else call.first._version

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
