"""Trace a forward pass: the modules called and the tensors read, in order, and the outputs."""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_iter

from hf_ft.models.example_inputs import example_inputs
from hf_ft.models.feature_hooks import Batch, run
from hf_ft.models.preserve import evaluating, random_states_kept


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
    with _recording(model, calls, itertools.count()), evaluating(model), torch.no_grad():
        run(model, batch)
    return calls


@contextlib.contextmanager
def _recording(model: nn.Module, calls: list[_Call], clock: Iterator[int]) -> Iterator[None]:
    """Append every call of a module to a list, while the context is open."""
    open_calls: list[_Call] = []

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
        yield
    finally:
        for handle in hooks:
            handle.remove()


# --- the order of a model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What runs when in a forward pass: times by name; what is never used has no time.

    Attributes:
        begins: when each module, anything in it, or a tensor is first used.
        ends: when the last use of each module or anything in it ends; tensors have none.
        called: names of the modules that are called; lists are not.
        fruitful: names of the parameters on which the logits depend, and of all modules that hold one, as far as known.
    """

    begins: Mapping[str, int]
    ends: Mapping[str, int]
    called: frozenset[str]
    fruitful: frozenset[str]


class Untraceable(Exception):
    """No example inputs suit a model; the message gives the error of the first."""


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, Order | str]] = weakref.WeakKeyDictionary()


def forward_order(model: nn.Module) -> Order:
    """The order in which one forward pass on example inputs uses modules and tensors; cached while these stay the same.

    Raises:
        Untraceable: if the model accepts none of the inputs that are made from its config.
    """
    layout = tuple((name, id(module)) for name, module in model.named_modules())
    known = _KNOWN.get(model)
    if known is None or known[0] != layout:
        known = layout, _first_that_runs(model)
        _KNOWN[model] = known
    if isinstance(known[1], str):
        raise Untraceable(known[1])
    return known[1]


def _first_that_runs(model: nn.Module) -> Order | str:
    """The order on the first inputs that a copy of the model, with the same tensors, accepts, or why there are none."""
    reason = "no inputs are known for it"
    try:
        copied = _double(model)
        with random_states_kept(0), evaluating(copied), _differentiable(copied):
            for number, batch in enumerate(example_inputs(copied)):
                try:
                    return _order(copied, batch)
                except Exception as error:  # a forward on unsuitable inputs may fail in any way
                    reason = reason if number else _said(error)
    except Exception as error:  # so may reading sizes from a config of unknown contents, or copying
        reason = _said(error)
    return reason


def _double(model: nn.Module) -> nn.Module:
    """A copy that shares the tensors: a forward pass may leave something behind, such as LeViT's attention biases.

    A model on the meta device gets zeros, which take up no memory as long as nothing is written to them.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): _zeros(tensor) if tensor.is_meta else tensor for tensor in tensors})


def _zeros(tensor: Tensor) -> Tensor:
    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _order(model: nn.Module, batch: Batch) -> Order:
    calls: list[_Call] = []
    clock = itertools.count()
    reads = _Reads(model, clock)
    with _recording(model, calls, clock), reads:
        output = model(**batch)
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    for call in calls:
        for holder in _with_holders(call.name):
            ends[holder] = max(call.end, ends.get(holder, 0))
    for name, time in [*((call.name, call.begin) for call in calls), *reads.first.items()]:
        for holder in _with_holders(name):
            begins[holder] = min(time, begins.get(holder, time))
    roots = {reads.names.get(id(tensor), "") for tensor in _roots(output)}
    if 2 * len(roots) < len(reads.first):  # a function with a custom backward hides what it reads (Reformer)
        roots = set(begins)
    fruitful = frozenset(holder for name in roots for holder in _with_holders(name))
    return Order(begins, ends, frozenset(call.name for call in calls), fruitful)


def _with_holders(name: str) -> Iterator[str]:
    """A name, and those of the modules that contain it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


@contextlib.contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Follow all parameters in the graph of the output, frozen ones too."""
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _roots(output: Any) -> Iterator[Tensor]:
    """The parameters on which the logits depend (any output, if none is called that)."""
    logits = output.get("logits") if isinstance(output, Mapping) else None
    tensors = [leaf for leaf in tree_iter(output if logits is None else logits) if isinstance(leaf, Tensor)]
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Any] = set(waiting)
    while waiting:
        node: Any = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        following = [child for child, _ in node.next_functions if child is not None and child not in seen]
        seen.update(following)
        waiting += following


class _Reads(TorchFunctionMode):
    """Note when each parameter and buffer is first an argument of an operation."""

    def __init__(self, model: nn.Module, clock: Iterator[int]) -> None:
        super().__init__()
        self.names = {
            id(tensor): name for name, tensor in itertools.chain(model.named_buffers(), model.named_parameters())
        }
        self.clock = clock
        self.first: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Size) and isinstance(result, (Tensor, tuple, list)):  # a shape is of no use
            for leaf in tree_iter((args, kwargs)):
                name = self.names.get(id(leaf)) if isinstance(leaf, Tensor) else None
                if name is not None and name not in self.first:
                    self.first[name] = next(self.clock)
        return result
