"""The anatomy of a model as data: stem, blocks, neck and head, and the chains that they form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from hf_ft.errors import AnatomyError


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
class Body:
    """Everything but the head: stem, blocks and neck; `stages` groups block indices into network stages."""

    stem: Part
    blocks: tuple[Part, ...]
    neck: Part
    stages: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False, repr=False)
class Anatomy:
    """Parts in forward order; `stages` groups block indices into network stages (without stages, one block each).

    Every parameter and buffer lies in the modules of exactly one part; stem and neck may be empty. The anatomy of an
    ensemble concatenates those of its members and keeps them in `members`, by module name.

    `rest` is everything but the head as one part. It is divided when its parts are first requested, so that what
    concerns only the head works on models whose blocks are unknown. Reading stem, blocks, neck, stages or parts then
    raises :class:`~hf_ft.errors.AnatomyError`; backbone and chains have the rest as one part instead.
    """

    head: Part
    rest: Part
    find_body: Callable[[], Body]
    members: tuple[tuple[str, Anatomy], ...] = ()

    @cached_property
    def body(self) -> Body:
        return self.find_body()

    @property
    def stem(self) -> Part:
        return self.body.stem

    @property
    def blocks(self) -> tuple[Part, ...]:
        return self.body.blocks

    @property
    def neck(self) -> Part:
        return self.body.neck

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        return self.body.stages

    @property
    def parts(self) -> tuple[Part, ...]:
        """Stem, blocks, neck and head, without empty parts."""
        return tuple(part for part in (self.stem, *self.blocks, self.neck, self.head) if part.modules)

    @property
    def backbone(self) -> tuple[Part, ...]:
        """All parts but the head."""
        try:
            return self.parts[:-1]
        except AnatomyError:
            return (self.rest,) if self.rest.modules else ()

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The chains of parts: one, or one per member."""
        if not self.members:
            return (Chain("", (*self.backbone, self.head)),)
        return tuple(Chain(name, (*member.backbone, member.head)) for name, member in self.members)

    @property
    def coarse_chains(self) -> tuple[Chain, ...]:
        """Chains of two parts, the rest and the head, which need no search for blocks."""
        members = self.members or (("", self),)
        return tuple(Chain(name, tuple(p for p in (one.rest, one.head) if p.modules)) for name, one in members)

    def _values(self) -> tuple[Part, Body, tuple[tuple[str, Anatomy], ...]]:
        return self.head, self.body, self.members

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, Anatomy) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        values = {"stem": self.stem, "blocks": self.blocks, "neck": self.neck, "head": self.head, "stages": self.stages}
        return f"Anatomy({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def joined(members: Sequence[tuple[str, Anatomy]]) -> Anatomy:
    """Combine the anatomies of an ensemble's members."""
    pairs = [(name, _renamed(member, f"{name}.")) for name, member in members]
    alone = [member for _, member in pairs]

    def find_body() -> Body:
        starts = itertools.accumulate((len(member.blocks) for member in alone), initial=0)
        return Body(
            stem=Part("stem", tuple(name for member in alone for name in member.stem.modules)),
            blocks=tuple(
                Part(f"member{index}_{block.name}", block.modules)
                for index, member in enumerate(alone)
                for block in member.blocks
            ),
            neck=Part("neck", tuple(name for member in alone for name in member.neck.modules)),
            stages=tuple(
                tuple(start + block for block in stage)
                for start, member in zip(starts, alone, strict=False)
                for stage in member.stages
            ),
        )

    head = Part("head", tuple(name for member in alone for name in member.head.modules))
    rest = Part("backbone", tuple(name for member in alone for name in member.rest.modules))
    return Anatomy(head, rest, find_body, tuple(pairs))


def _renamed(found: Anatomy, prefix: str) -> Anatomy:
    """A copy with a prefix before each name."""

    def part(old: Part) -> Part:
        return Part(old.name, tuple(prefix + name for name in old.modules))

    def find_body() -> Body:
        body = found.body
        return Body(part(body.stem), tuple(part(block) for block in body.blocks), part(body.neck), body.stages)

    return Anatomy(part(found.head), part(found.rest), find_body)
