"""What of a model is alive in a stage: where each of its chains begins to train or change, and what rests before."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from hf_ft.core.plan import Stage
from hf_ft.models.names import covers
from hf_ft.models.norms import batch_norms, is_dropout
from hf_ft.models.parts import Chain, Part


@dataclass(frozen=True)
class Liveness:
    """What is alive.

    Attributes:
        trained_from: of each chain, the index of the first part in which a parameter trains.
        live_from: of each chain, the index of the first part that trains or whose statistics move.
        chains: of each chain, the parts from there on; the first holds only what is alive in it.
        resting: the modules before all that trains; they run in evaluation mode, dropout and norms alike.
        has_prefix: whether something that neither trains nor changes lies before.
    """

    trained_from: tuple[int, ...]
    live_from: tuple[int, ...]
    chains: tuple[Chain, ...]
    resting: tuple[nn.Module, ...]
    has_prefix: bool


def moving_norms(model: nn.Module, stage: Stage, trained: Collection[str]) -> list[str]:
    """The normalisation layers that use and move batch statistics in a stage which trains these parameters."""
    if stage.norm_mode == "train":
        return [name for name, _ in batch_norms(model)]
    if stage.norm_mode == "eval":
        return []
    return [name for name, _ in batch_norms(model) if any(covers(name, parameter) for parameter in trained)]


def liveness(model: nn.Module, chains: Sequence[Chain], trained: Collection[str], moving: Collection[str]) -> Liveness:
    """What is alive where these parameters train and these normalisation layers move their statistics."""
    trained_from, live_from, live, resting, has_prefix = [], [], [], [], False
    for chain in chains:
        first = _first(chain.parts, trained)
        begin = min(first, _first(chain.parts, moving))
        parts = list(chain.parts[begin:])
        if first < len(chain.parts):
            for part in chain.parts[:first]:
                resting += [module for name in part.modules for module in _modules(model, name)]
            inside = _Inside(model, trained, moving).look(chain.parts[first])
            resting += [module for name in inside.resting for module in _modules(model, name)]
            if begin == first:
                parts[0] = Part(parts[0].name, tuple(inside.alive))
                has_prefix |= bool(inside.resting)
        elif trained:  # another chain trains, and this one only gives its part
            resting += [module for part in chain.parts for name in part.modules for module in _modules(model, name)]
        has_prefix |= begin > 0
        trained_from.append(first)
        live_from.append(begin)
        live.append(Chain(chain.name, tuple(parts)))
    return Liveness(tuple(trained_from), tuple(live_from), tuple(live), tuple(resting), has_prefix)


def _first(parts: Sequence[Part], names: Collection[str]) -> int:
    """The index of the first part that holds one of these parameters or modules."""
    holds = (any(covers(module, name) for module in part.modules for name in names) for part in parts)
    return next((index for index, found in enumerate(holds) if found), len(parts))


def _modules(model: nn.Module, name: str) -> Iterator[nn.Module]:
    try:
        yield from model.get_submodule(name).modules()
    except AttributeError:  # a single parameter
        return


@dataclass
class _Inside:
    """Within the first part that trains: what rests, being frozen and defined before the first that trains."""

    model: nn.Module
    trained: Collection[str]
    moving: Collection[str]
    resting: list[str] = field(default_factory=list)
    alive: list[str] = field(default_factory=list)

    def look(self, part: Part) -> _Inside:
        modules = dict(self.model.named_modules())
        if any(name not in modules for name in part.modules if name in self.trained):
            self.alive = list(part.modules)  # a parameter outside of all modules may be used anywhere
            return self
        self._began = False
        for name in part.modules:
            if name in modules:
                self._walk(name, modules[name])
        return self

    def _walk(self, name: str, module: nn.Module) -> None:
        if not self._changes(name, module):
            has_weights = next(module.parameters(), None) is not None
            if has_weights and not self._began:
                self.resting.append(name)
            elif any(is_dropout(inner) for inner in module.modules()):
                self.alive.append(name)  # all else that is frozen does the same in both modes
            return
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        children = list(module.named_children())
        if name in self.moving or not children or any(parameter in self.trained for parameter in own):
            self._began = True
            self.alive.append(name)
            return
        for child, inner in children:
            self._walk(f"{name}.{child}", inner)

    def _changes(self, name: str, module: nn.Module) -> bool:
        if any(f"{name}.{parameter}" in self.trained for parameter, _ in module.named_parameters()):
            return True
        return any(covers(name, norm) for norm in self.moving)
