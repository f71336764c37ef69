"""Run only what follows a frozen prefix: the activations at its borders stand in for all that comes before.

Whatever a frozen, deterministic part of a model computes from a sample is the same each time. What the rest needs of
it, the outputs at its *borders*, is recorded once; later forward passes *replay* it: for their duration, the modules
at the borders return what was recorded, and all other modules before them return placeholders of the right shape. The
model's own forward, its head and its loss stay as they are.

One border is enough at the end of a block. Inside of a residual block there are two: the shortcut needs the block's
input as well. A model of several members has borders in each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from hf_ft.models.feature_hooks import Batch, activations


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
    """What comes before some borders, and how to leave it out.

    Attributes:
        borders: names of the modules whose outputs are recorded.
        kept: the batch's columns that are still needed.
        skipped: the columns that are not, such as pixels: replaced by placeholders.
        constants: what in a batch does not belong to single samples.
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
        """The activations at the borders for a batch, (B, ...) each, without gradient and in evaluation mode."""
        found = activations(self.model, self.borders, batch)
        return tuple(found[border] for border in self.borders)

    def batch(self, rows: Mapping[str, Tensor], samples: int) -> dict[str, Any]:
        """Keyword arguments for the model from the kept columns, placeholders for the others."""
        skipped = {name: place.make(samples) for name, place in self.skipped.items()}
        return {**skipped, **self.constants, **{name: rows[name] for name in self.kept if name in rows}}

    @contextlib.contextmanager
    def replaying(self, at_borders: Sequence[Tensor]) -> Iterator[None]:
        """Within this context the model's forward starts at the borders."""
        patched: list[tuple[nn.Module, Any]] = []
        returning = [*self._placeholders(len(at_borders[0])), *self._recorded(at_borders)]
        try:
            for module, forward in returning:
                patched.append((module, module.__dict__.get("forward")))
                module.forward = forward
            yield
        finally:
            for module, forward in patched:
                if forward is None:
                    del module.forward
                else:  # accelerate patches the forward of what it prepares
                    module.forward = forward

    def _recorded(self, at_borders: Sequence[Tensor]) -> list[tuple[nn.Module, _Returns]]:
        made = []
        for border, activation in zip(self.borders, at_borders, strict=True):
            leaves, structure = self._outputs[border]
            filled = [activation if isinstance(leaf, Placeholder) else leaf for leaf in leaves]
            made.append((self.model.get_submodule(border), _Returns(tree_unflatten(filled, structure))))
        return made

    def _placeholders(self, samples: int) -> list[tuple[nn.Module, _Returns]]:
        """The modules that are left out, each with what it returns for so many samples."""
        if samples not in self._made:
            self._made[samples] = []
            for name, (leaves, structure) in self._outputs.items():
                if name in self.borders:
                    continue
                filled = [leaf.make(samples) if isinstance(leaf, Placeholder) else leaf for leaf in leaves]
                module = self.model.get_submodule(name)
                self._made[samples].append((module, _Returns(tree_unflatten(filled, structure))))
        return self._made[samples]

    def __call__(self, at_borders: Sequence[Tensor], rows: Mapping[str, Tensor]) -> Any:
        """The model's outputs from recorded activations and the kept columns."""
        with self.replaying(at_borders):
            return self.model(**self.batch(rows, len(at_borders[0])))


class _Returns:
    """A forward that gives the same whatever it is called with."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value
