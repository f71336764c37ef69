"""Whether modules of a classifier can have two paths, as found by one forward pass on example inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_ft.errors import OptionError
from hf_ft.models.example_inputs import example_inputs
from hf_ft.models.names import Names
from hf_ft.models.preserve import untouched

SAMPLES = 2


@dataclass
class Seen:
    """The observed inputs and outputs of a module.

    Attributes:
        calls: how often it was called.
        inputs: shape of the first tensor that it takes.
        output: shape of the first tensor that it returns; empty if it returns none.
        changes: whether it changes its input in place.
    """

    calls: int = 0
    inputs: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    changes: bool = False
    versions: list[int] = field(default_factory=list)

    @property
    def has_rows(self) -> bool:
        """Whether it returns a row for each sample."""
        return self.output[:1] == (SAMPLES,)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = _tensors((args, kwargs))
        self.calls += 1
        self.inputs = tuple(tensors[0].shape) if tensors else ()
        self.versions = [tensor._version for tensor in tensors]

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensors = _tensors(output)
        self.output = tuple(tensors[0].shape) if tensors and tensors[0].is_floating_point() else ()
        self.changes |= self.versions != [tensor._version for tensor in _tensors((args, kwargs))]


def survey(
    model: nn.Module, names: Sequence[str], run: Callable[[dict[str, Tensor]], Any]
) -> tuple[dict[str, Seen], Any]:
    """Run two samples through a model, and watch some of its modules.

    Args:
        run: runs a batch; its result is returned.

    Raises:
        OptionError: if no example inputs suit the model.
    """
    reason = "no inputs are known for it"
    with untouched(model):
        for number, batch in enumerate(example_inputs(model)):
            seen = {name: Seen() for name in names}
            try:
                with _hooks(model, seen):
                    return seen, run({name: torch.cat([value] * SAMPLES) for name, value in batch.items()})
            except Exception as error:  # a forward on unsuitable inputs may fail in any way
                reason = reason if number else f"{type(error).__name__}: {error}".splitlines()[0]
    raise OptionError(f"{type(model).__name__} could not be run on example inputs ({reason}): use another model.")


@contextlib.contextmanager
def _hooks(model: nn.Module, seen: dict[str, Seen]) -> Iterator[None]:
    handles = []
    for name, one in seen.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(one.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(one.leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def units_of(model: nn.Module, blocks: Sequence[Names]) -> tuple[Names, ...]:
    """The modules of each block that have tensors of their own."""
    modules = dict(model.named_modules())
    return tuple(
        tuple(name for name in block if name in modules and next(_state(modules[name]), None) is not None)
        for block in blocks
    )


def _state(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def called_units(blocks: Sequence[Names], seen: Mapping[str, Seen]) -> tuple[Names, ...]:
    """The modules of each block that return a row for each sample, so that each sample can choose its path.

    The last module of a block must do so; others, such as position embeddings that it needs, are not chosen.

    Raises:
        OptionError: if a block has none, or one that changes its input in place.
    """
    chosen = []
    for block in blocks:
        last = seen[block[-1]] if block else Seen()
        if not last.calls:
            raise OptionError(
                f"{block[-1] if block else 'a block without tensors'!r} is never called in a forward pass, so there is "
                "no output to choose. Name other blocks with blocks=..."
            )
        if not last.has_rows:
            raise OptionError(
                f"{block[-1]!r} gives {last.output or 'no tensor'} for {SAMPLES} samples, not one row for each, so no "
                "sample can choose its path. Name other blocks with blocks=..."
            )
        chosen.append(tuple(unit for unit in block if seen[unit].has_rows))
        changing = [unit for unit in chosen[-1] if seen[unit].changes]
        if changing:
            raise OptionError(
                f"{changing[0]!r} changes its input in place, so a second path would see another one. Name other "
                "blocks with blocks=..."
            )
    return tuple(chosen)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
