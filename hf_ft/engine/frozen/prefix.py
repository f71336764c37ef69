"""Skip a frozen prefix: recorded activations at its borders replace everything before them.

A frozen, deterministic part of a model computes the same from a sample every time. Its outputs at the *borders*, which
the rest of the model needs, are recorded once; later forward passes *replay* them: meanwhile, the modules at the
borders return the recorded activations, and all other modules before them return placeholders of the right shape. The
model's own forward, its head and its loss are unchanged.

At the end of a block one border is enough. Inside a residual block there are two, since the shortcut also needs the
block's input. An ensemble has borders in each member.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from hf_ft.models.feature_hooks import Batch, activations, run


@dataclass(frozen=True)
class Placeholder:
    """Stands for a tensor with one entry per sample whose values are never used."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self, samples: int) -> Tensor:
        """Zeros (samples, *shape) that occupy the memory of a single element."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(samples, *self.shape)


@dataclass(frozen=True, eq=False)
class FrozenPrefix:
    """The part of a model before some borders, and how to skip it.

    Attributes:
        borders: names of the modules whose outputs are recorded.
        kept: batch columns that are still needed.
        skipped: batch columns that are not, such as pixels; placeholders replace them.
        constants: batch entries without a sample dimension.
    """

    model: nn.Module
    borders: tuple[str, ...]
    kept: tuple[str, ...]
    skipped: Mapping[str, Placeholder]
    constants: Mapping[str, Any]
    _outputs: Mapping[str, tuple[list[Any], Any]]  # module name -> leaves and structure of its output
    _made: dict[int, list[tuple[nn.Module, _Returns]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the modules that do not run."""
        return tuple(self._outputs)

    def record(self, batch: Batch) -> tuple[Tensor, ...]:
        """Activations at the borders for a batch, (B, ...) each, in evaluation mode without gradient."""
        states = activations(self.model, self.borders, batch)
        return tuple(states[border] for border in self.borders)

    def batch(self, rows: Mapping[str, Tensor], samples: int) -> dict[str, Any]:
        """Keyword arguments of the model: the kept columns, and placeholders for the others."""
        placeholders = {name: place.make(samples) for name, place in self.skipped.items()}
        return {**placeholders, **self.constants, **{name: rows[name] for name in self.kept if name in rows}}

    @contextlib.contextmanager
    def replaying(self, at_borders: Sequence[Tensor]) -> Iterator[None]:
        """Make the model's forward start at the borders while the context is open."""
        originals: list[tuple[nn.Module, Any]] = []
        returning = [*self._placeholders(len(at_borders[0])), *self._recorded(at_borders)]
        try:
            for module, forward in returning:
                originals.append((module, module.__dict__.get("forward")))
                module.forward = forward
            yield
        finally:
            for module, forward in originals:
                if forward is None:
                    del module.forward
                else:  # accelerate patches the forward of prepared models
                    module.forward = forward

    def _recorded(self, at_borders: Sequence[Tensor]) -> list[tuple[nn.Module, _Returns]]:
        forwards = []
        for border, activation in zip(self.borders, at_borders, strict=True):
            leaves, structure = self._outputs[border]
            values = [activation if isinstance(leaf, Placeholder) else leaf for leaf in leaves]
            forwards.append((self.model.get_submodule(border), _Returns(tree_unflatten(values, structure))))
        return forwards

    def _placeholders(self, samples: int) -> list[tuple[nn.Module, _Returns]]:
        """The skipped modules, each with its output for this number of samples."""
        if samples not in self._made:
            self._made[samples] = []
            for name, (leaves, structure) in self._outputs.items():
                if name in self.borders:
                    continue
                values = [leaf.make(samples) if isinstance(leaf, Placeholder) else leaf for leaf in leaves]
                module = self.model.get_submodule(name)
                self._made[samples].append((module, _Returns(tree_unflatten(values, structure))))
        return self._made[samples]

    def __call__(self, at_borders: Sequence[Tensor], rows: Mapping[str, Tensor]) -> Any:
        """Compute the model's outputs from recorded activations and the kept columns."""
        with self.replaying(at_borders):
            return run(self.model, self.batch(rows, len(at_borders[0])))


class _Returns:
    """A forward that returns a fixed value for any input."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value
