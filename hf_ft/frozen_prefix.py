"""Run only what follows a frozen prefix: the activations at its border stand in for all that comes before.

Whatever a frozen, deterministic part of a model computes from a sample is the same each time. Its output at the
*border* is recorded once; later forward passes *replay* it: for their duration, the border module returns the
recorded activation, and the modules before it return placeholders of the right shape. The model's own forward,
its head and its loss stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_ft.anatomy import Part
from hf_ft.plan import covers
from hf_ft.taps import run_to
from hf_ft.undisturbed import evaluating

TRIES = 6  # borders tried before giving up; one is enough in nearly all architectures
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Placeholder:
    """Stands for a tensor with one entry per sample, whose values nobody may depend on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self, samples: int) -> Tensor:
        """Zeros (samples, *shape) that take the memory of one number."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(samples, *self.shape)


@dataclass(frozen=True, eq=False)
class FrozenPrefix:
    """What comes before a border, and how to leave it out.

    Attributes:
        border: name of the module whose output is recorded.
        kept: the batch's columns that are still needed.
        skipped: the columns that are not, such as pixels: replaced by placeholders.
        constants: what in a batch does not belong to single samples.
    """

    model: nn.Module
    border: str
    kept: tuple[str, ...]
    skipped: Mapping[str, Placeholder]
    constants: Mapping[str, Any]
    _outputs: Mapping[str, tuple[list[Any], Any]]  # module name -> leaves and structure of its output; border last
    _made: dict[int, list[tuple[nn.Module, _Returns]]] = field(default_factory=dict, init=False, repr=False)

    def record(self, batch: Batch) -> Tensor:
        """The activations at the border for a batch, (B, ...), without gradient and in evaluation mode."""
        return activations(self.model, [self.border], batch)[self.border]

    def batch(self, rows: Mapping[str, Tensor], samples: int) -> dict[str, Any]:
        """Keyword arguments for the model from the kept columns, placeholders for the others."""
        skipped = {name: place.make(samples) for name, place in self.skipped.items()}
        return {**skipped, **self.constants, **{name: rows[name] for name in self.kept if name in rows}}

    @contextlib.contextmanager
    def replaying(self, activation: Tensor) -> Iterator[None]:
        """Within this context the model's forward starts at the border."""
        patched: list[tuple[nn.Module, Any]] = []
        try:
            for module, forward in self._placeholders(len(activation)):
                patched.append((module, module.__dict__.get("forward")))
                module.forward = forward
            leaves, structure = self._outputs[self.border]
            made = [activation if isinstance(leaf, Placeholder) else leaf for leaf in leaves]
            module.forward = _Returns(tree_unflatten(made, structure))  # the last one: the border
            yield
        finally:
            for module, forward in patched:
                if forward is None:
                    del module.forward
                else:  # accelerate patches the forward of what it prepares
                    module.forward = forward

    def _placeholders(self, samples: int) -> list[tuple[nn.Module, _Returns]]:
        """The modules that are left out, each with what it returns for so many samples; the border comes last."""
        if samples not in self._made:
            self._made[samples] = []
            for name, (leaves, structure) in self._outputs.items():
                filled = [leaf.make(samples) if isinstance(leaf, Placeholder) else leaf for leaf in leaves]
                module = self.model.get_submodule(name)
                self._made[samples].append((module, _Returns(tree_unflatten(filled, structure))))
        return self._made[samples]

    def __call__(self, activation: Tensor, rows: Mapping[str, Tensor]) -> Any:
        """The model's outputs from recorded activations and the kept columns."""
        with self.replaying(activation):
            return self.model(**self.batch(rows, len(activation)))


class _Returns:
    """A forward that gives the same whatever it is called with."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


def activations(model: nn.Module, borders: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """Several layers in one forward pass, which ends at the last of them (see :mod:`hf_ft.taps`).

    Returns:
        By layer, (B, ...), in evaluation mode and without gradient.

    Raises:
        OptionError: one of the modules is not called.
    """
    with evaluating(model), torch.no_grad():
        return run_to(model, borders, batch)


def module_outputs(model: nn.Module, batch: Batch) -> list[tuple[str, tuple[int, ...]]]:
    """The modules whose output is one tensor, with its shape, in the order in which they end."""
    calls = sorted(_trace(model, batch), key=lambda call: call.end)
    return [(c.name, tuple(c.output.shape)) for c in calls if isinstance(c.output, Tensor)]


@dataclass
class _Call:
    """One call of a module: when it began and ended, and what came out."""

    name: str
    begin: int
    end: int = 0
    output: Any = None


def find_prefix(
    model: nn.Module, live: Iterable[Part], first: Batch, second: Batch, varying: Iterable[str] = ()
) -> FrozenPrefix | None:
    """The longest prefix that can be left out.

    Args:
        live: parts that train or change; the border lies before the first of them.
        first: a batch to trace, on the model's device.
        second: another one, of other samples and another size, on which replaying is compared with the full
            forward before it is trusted.
        varying: columns whose rows differ in shape, so that they cannot be kept.

    Returns:
        None where no border gives the full forward's outputs.
    """
    samples = _samples(first)
    calls = _trace(model, first)
    units = [name for part in live for name in part.modules]
    begins = [call.begin for call in calls if any(covers(unit, call.name) for unit in units)]
    if not begins or samples is None or _samples(second) is None:
        return None
    times = [call.name for call in calls]
    possible = [
        call
        for call in calls
        if call.end < min(begins) and times.count(call.name) == 1 and _is_activation(call.output, samples)
    ]
    with evaluating(model), torch.no_grad():
        full = _tensors(model(**second))
    for call in sorted(possible, key=lambda call: -call.end)[:TRIES]:
        prefix = _prefix(model, call, calls, first, samples, tuple(varying))
        if prefix is not None and _same(prefix, second, full):
            return prefix
    return None


def _prefix(
    model: nn.Module, border: _Call, calls: list[_Call], batch: Batch, samples: int, varying: tuple[str, ...]
) -> FrozenPrefix | None:
    """A prefix that ends with this call; None where a module of it is called again later."""
    done = [call for call in calls if call.end <= border.end]
    outermost = [c for c in done if not any(o.begin < c.begin and c.end < o.end for o in done)]
    later = {call.name for call in calls if call.end > border.end}
    if later & {call.name for call in outermost}:
        return None
    outermost.sort(key=lambda call: call.end)  # so that the border comes last
    outputs = {call.name: _template(call.output, samples) for call in outermost}
    columns = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() and len(v) == samples}
    skipped = {
        name: Placeholder(tuple(column.shape[1:]), column.dtype, column.device)
        for name, column in columns.items()
        # Pixels: what the prefix is there to replace. All else is small, and masks may be needed later on.
        if name in varying or (column.is_floating_point() and column.dim() > 2)
    }
    kept = tuple(name for name in columns if name not in skipped)
    constants = {name: value for name, value in batch.items() if name not in columns}
    return FrozenPrefix(model, border.name, kept, skipped, constants, outputs)


def _trace(model: nn.Module, batch: Batch) -> list[_Call]:
    """All calls of modules in one forward pass in evaluation mode, in the order they began."""
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
            model(**batch)
    finally:
        for handle in hooks:
            handle.remove()
    return calls


def _samples(batch: Batch) -> int | None:
    """The number of samples, if all tensors with a first dimension agree on it."""
    sizes = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def _is_activation(output: Any, samples: int) -> bool:
    """Whether an output holds one tensor alone, with one entry per sample."""
    tensors = _tensors(output)
    return len(tensors) == 1 and tensors[0].dim() > 1 and len(tensors[0]) == samples


def _template(output: Any, samples: int) -> tuple[list[Any], Any]:
    """An output's structure; what has an entry per sample becomes a placeholder, all else keeps its value."""
    leaves, structure = tree_flatten(output)
    made = [
        Placeholder(tuple(leaf.shape[1:]), leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == samples
        else leaf
        for leaf in leaves
    ]
    return made, structure


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


def _same(prefix: FrozenPrefix, batch: Batch, full: list[Tensor]) -> bool:
    """Whether replaying gives the outputs of the full forward."""
    try:
        activation = prefix.record(batch)
        with evaluating(prefix.model), torch.no_grad():
            found = _tensors(prefix(activation, {name: batch[name] for name in prefix.kept}))
    except Exception:  # code between two modules may not take a placeholder, in whatever way
        return False
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in full]:
        return False
    return all(
        torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-6 * float(other.float().abs().amax() + 1))
        for one, other in zip(found, full, strict=True)
        if other.numel()
    )
