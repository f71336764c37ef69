"""The live part of a model in a stage: where each chain begins to train or change, and what is frozen before."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers.utils import logging

from hf_ft.core.plan import Stage
from hf_ft.models.anatomy import unwrap
from hf_ft.models.architectures import TRAIN_MODE_ALONE
from hf_ft.models.names import Names, covered, covers, parents
from hf_ft.models.norms import batch_norms, is_dropout
from hf_ft.models.parts import Chain, Part

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Liveness:
    """The live part of a model in a stage.

    Attributes:
        trained_from: for each chain, the index of the first part with a trained parameter.
        live_from: for each chain, the index of the first part that trains or whose running statistics change.
        chains: each chain from that part on; its first part keeps only the modules that are live.
        resting: modules before everything that trains, and those that contain nothing else; they run in evaluation
            mode, dropout and norms included.
        has_prefix: whether anything before the live part neither trains nor changes.
    """

    trained_from: tuple[int, ...]
    live_from: tuple[int, ...]
    chains: tuple[Chain, ...]
    resting: tuple[nn.Module, ...]
    has_prefix: bool


def moving_norms(model: nn.Module, stage: Stage, trained: Collection[str]) -> list[str]:
    """Normalisation layers that use and update batch statistics in a stage that trains these parameters."""
    if stage.norm_mode == "train":
        return [name for name, _ in batch_norms(model)]
    if stage.norm_mode == "eval":
        return []
    return [name for name, _ in batch_norms(model) if any(covers(name, parameter) for parameter in trained)]


def liveness(model: nn.Module, chains: Sequence[Chain], trained: Collection[str], moving: Collection[str]) -> Liveness:
    """Determine the live part, given the trained parameters and the norms that update their statistics."""
    trained_from, live_from, live, has_prefix = [], [], [], False
    before: list[str] = []  # modules and bare parameters before everything that trains
    for chain in chains:
        first = _first(chain.parts, trained)
        begin = min(first, _first(chain.parts, moving))
        parts = list(chain.parts[begin:])
        if first < len(chain.parts):
            before += [name for part in chain.parts[:first] for name in part.modules]
            inside = _Inside(model, trained, moving).look(chain.parts[first])
            before += inside.resting
            if begin == first:
                parts[0] = Part(parts[0].name, tuple(inside.alive))
                has_prefix |= bool(inside.resting)
        elif trained:  # another chain trains; this one only contributes its outputs
            before += [name for part in chain.parts for name in part.modules]
        has_prefix |= begin > 0
        trained_from.append(first)
        live_from.append(begin)
        live.append(Chain(chain.name, tuple(parts)))
    resting = tuple(_resting(model, before))
    return Liveness(tuple(trained_from), tuple(live_from), tuple(live), resting, has_prefix)


def _first(parts: Sequence[Part], names: Collection[str]) -> int:
    """The index of the first part that contains one of these parameters or modules."""
    holds = (any(covers(module, name) for module in part.modules for name in names) for part in parts)
    return next((index for index, match in enumerate(holds) if match), len(parts))


def _resting(model: nn.Module, before: Sequence[str]) -> list[nn.Module]:
    """The modules that run in evaluation mode: those before everything that trains, and containers of only such.

    A container may apply dropout, LayerDrop or SpecAugment of its own (BART's decoder, BioGPT, wav2vec2), so it rests
    as soon as all its parameters do. A container that also holds a trained module, or one behind it, stays in train
    mode, because:

    - what it applies also acts on what trains: SpecAugment is between wav2vec2's frozen convolutions and its layers.
      Where it also acts on frozen modules, nothing is recorded after it (see `PrefixFinder._steady`).
    - gradients pass through what lies behind a trained module. Gradient checkpointing and Reformer's reversible layers
      need train mode there, and dropout there regularises what trains, e.g. adapters in frozen layers.
    """
    modules = dict(model.named_modules())
    resting = {inner: None for name in before if name in modules for inner in modules[name].modules()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    still = {id(parameter) for module in resting for parameter in module.parameters(recurse=False)}
    still |= {id(parameters[name]) for name in before if name in parameters}
    holders = {parent for name in parameters for parent in ("", *parents(name))}
    trained = [name for name, parameter in parameters.items() if id(parameter) not in still]
    containers = holders - {parent for name in trained for parent in ("", *parents(name))}
    for name, module in modules.items():
        if name in containers and module not in resting:
            resting |= dict.fromkeys(module.modules())
    return list(resting)


@dataclass
class _Inside:
    """Split the first trained part: its frozen modules defined before the first trained one rest."""

    model: nn.Module
    trained: Collection[str]
    moving: Collection[str]
    resting: list[str] = field(default_factory=list)
    alive: list[str] = field(default_factory=list)

    def look(self, part: Part) -> _Inside:
        modules = dict(self.model.named_modules())
        if any(name not in modules for name in part.modules if name in self.trained):
            self.alive = list(part.modules)  # a parameter outside any module may be used anywhere
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
                self.alive.append(name)  # other frozen modules behave the same in both modes
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


def with_dropout(model: nn.Module, stage: Stage, trained: Collection[str], head: Names) -> bool:
    """Whether dropout is active in a stage: if the stage uses it, or if gradients must pass through layers needing it.

    Args:
        trained: names of the parameters that the stage trains.
        head: names of the head's modules.
    """
    base = unwrap(model)[0]
    if stage.dropout or getattr(getattr(base, "config", None), "model_type", None) not in TRAIN_MODE_ALONE:
        return stage.dropout
    if all(covered(name, set(head)) for name in trained):
        return False
    logger.warning_once(
        f"Stage {stage.name!r} trains with dropout although it should not: the layers of {type(base).__name__} "
        "have gradients only in train mode. Set the dropout of the model's config to 0 instead."
    )
    return True
