"""The findings of the data checks, in words and as a file."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hf_ft.data.groups import SharedGroups
from hf_ft.processes import process_name
from hf_ft.records import read_json, restored, stored

FILE = "data_checks.json"
FORMAT = 1
SHOWN = 3  # classes named in a sentence
Kind = Literal["same", "near"]


@dataclass(frozen=True)
class Sample:
    """A sample of a set of duplicates.

    Attributes:
        row: its number in the source of the split.
        file: its path relative to the folder that all files share; empty if it is not a file.
        label: its class or value; None without one.
    """

    split: str
    row: int
    file: str = ""
    label: str | None = None

    def __str__(self) -> str:
        name = f"{self.split} {self.row}" + (f" ({self.file})" if self.file else "")
        return name if self.label is None else f"{name}: {self.label}"


@dataclass(frozen=True)
class Duplicates:
    """Samples that are equal (``same``) or nearly equal (``near``)."""

    kind: Kind
    samples: tuple[Sample, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that they are in."""
        return tuple(dict.fromkeys(sample.split for sample in self.samples))

    @property
    def disagree(self) -> bool:
        """Whether they have different labels."""
        return len({sample.label for sample in self.samples} - {None}) > 1


@dataclass(frozen=True)
class DataChecks:
    """The findings.

    Attributes:
        sizes: number of samples by split.
        duplicates: sets of equal, then of nearly equal samples.
        not_compared: why no search for duplicates was made; empty if one was made.
        single: classes with one training sample.
        absent: classes that some split has but this one lacks, by split.
        shared: groups that splits have in common.
        dropped: number of training samples dropped on request; see :func:`to_drop`.
        keys: identifies the data of each split.
    """

    sizes: Mapping[str, int]
    duplicates: tuple[Duplicates, ...] = ()
    not_compared: str = ""
    single: tuple[str, ...] = ()
    absent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared: tuple[SharedGroups, ...] = ()
    dropped: int = 0
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether there is nothing to report."""
        return not (self.duplicates or self.single or any(self.absent.values()) or self.shared)

    def sentences(self) -> list[str]:
        """The findings, one sentence each; the first says what was compared."""
        said = [*self._duplicates("same", "equal to"), *self._duplicates("near", "nearly equal to")]
        if self.not_compared:
            said = [self.not_compared]
        elif not said:
            said = [f"no duplicates among {sum(self.sizes.values()):,} samples"]
        if self.dropped:
            said.append(f"{self.dropped:,} of {_samples(self.sizes['train'])} of train dropped as duplicates")
        if self.single:
            said.append(f"{_classes(self.single)} with a single training sample: {_named(self.single)}")
        said += [
            f"{split} has no sample of {_classes(names)}: {_named(names)}"
            for split, names in self.absent.items()
            if names
        ]
        return [*said, *map(str, self.shared)]

    def _duplicates(self, kind: Kind, equal: str) -> list[str]:
        sets = [one for one in self.duplicates if one.kind == kind]
        said = []
        for one, other in itertools.combinations_with_replacement(self.sizes, 2):
            number = sum(_repeated(duplicates, one, other) for duplicates in sets)
            if number:
                where = "others in it" if one == other else one
                said.append(f"{_samples(number)} of {other} {equal} {where}")
        if disagreeing := sum(duplicates.disagree for duplicates in sets):
            what = "equal" if kind == "same" else "nearly equal"
            said.append(f"{disagreeing:,} set{'s' * (disagreeing > 1)} of {what} samples with different labels")
        return said

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **stored(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DataChecks:
        """Restore from :meth:`to_dict`, also after a round trip through JSON.

        Raises:
            CheckpointError: if the content is something else.
        """
        return restored(cls, content, "checks of data")

    def save(self, folder: str | Path) -> Path:
        """Write :data:`FILE` into the folder atomically; several processes may do so."""
        file = Path(folder) / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_name(f"{FILE}.{process_name()}")
        written.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(written, file)
        return file

    @classmethod
    def load(cls, folder: str | Path) -> DataChecks:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: if the file is missing, damaged, or of another kind.
        """
        return cls.from_dict(read_json(Path(folder) / FILE))

    def first(self, count: int) -> DataChecks:
        """A copy with at most this many sets of duplicates: those between splits or with different labels first."""
        ordered = sorted(self.duplicates, key=lambda one: (len(one.splits) == 1, not one.disagree))
        return replace(self, duplicates=tuple(ordered[:count]))


def to_drop(duplicates: Iterable[Duplicates]) -> set[int]:
    """The rows of train that are dropped with ``on_duplicates="drop"``.

    A training sample that is equal or nearly equal to one of another split is dropped. Of equal training samples, the
    first is kept; if their labels differ, none is. Nearly equal training samples are kept.
    """
    rows: set[int] = set()
    for one in duplicates:
        own = [sample.row for sample in one.samples if sample.split == "train"]
        if len(own) < len(one.samples):
            rows.update(own)
        elif one.kind == "same":
            rows.update(own if one.disagree else own[1:])
    return rows


def _repeated(duplicates: Duplicates, one: str, other: str) -> int:
    """Samples of the other split that repeat one of the first; within a split, those after the first."""
    counts = Counter(sample.split for sample in duplicates.samples)
    if one == other:
        return max(0, counts[one] - 1)
    return counts[other] if counts[one] else 0


def _samples(number: int) -> str:
    return f"{number:,} sample{'s' * (number != 1)}"


def _classes(names: tuple[str, ...]) -> str:
    return f"{len(names):,} class{'es' * (len(names) > 1)}"


def _named(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
