"""The anatomy of a model as data: stem, blocks, neck and head, and the chains that they form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A group of modules that is trained or frozen as a unit; `modules` holds names, in forward order."""

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """Parts that feed one another in sequence, and the name of the module that holds them (`""`: the whole model)."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Anatomy:
    """Parts in forward order; `stages` groups block indices into network stages (without stages, one block each).

    Every parameter and buffer lies in the modules of exactly one part; stem and neck may be empty. The anatomy of an
    ensemble concatenates those of its members and keeps them in `members`, by module name.
    """

    stem: Part
    blocks: tuple[Part, ...]
    neck: Part
    head: Part
    stages: tuple[tuple[int, ...], ...]
    members: tuple[tuple[str, Anatomy], ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Stem, blocks, neck and head, without empty parts."""
        return tuple(part for part in (self.stem, *self.blocks, self.neck, self.head) if part.modules)

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The chains of parts: one, or one per member."""
        if not self.members:
            return (Chain("", self.parts),)
        return tuple(Chain(name, member.parts) for name, member in self.members)


def joined(members: Sequence[tuple[str, Anatomy]]) -> Anatomy:
    """Combine the anatomies of an ensemble's members."""
    pairs = [(name, _renamed(member, f"{name}.")) for name, member in members]
    alone = [member for _, member in pairs]
    starts = itertools.accumulate((len(member.blocks) for member in alone), initial=0)
    return Anatomy(
        stem=Part("stem", tuple(name for member in alone for name in member.stem.modules)),
        blocks=tuple(
            Part(f"member{index}_{block.name}", block.modules)
            for index, member in enumerate(alone)
            for block in member.blocks
        ),
        neck=Part("neck", tuple(name for member in alone for name in member.neck.modules)),
        head=Part("head", tuple(name for member in alone for name in member.head.modules)),
        stages=tuple(
            tuple(start + block for block in stage)
            for start, member in zip(starts, alone, strict=False)
            for stage in member.stages
        ),
        members=tuple(pairs),
    )


def _renamed(found: Anatomy, prefix: str) -> Anatomy:
    """A copy with a prefix before each name."""

    def part(old: Part) -> Part:
        return Part(old.name, tuple(prefix + name for name in old.modules))

    blocks = tuple(part(block) for block in found.blocks)
    return Anatomy(part(found.stem), blocks, part(found.neck), part(found.head), found.stages)
