"""The cases, how they end, and the file that keeps the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PARTS = ("kills", "workers", "operations", "mutations")
RIGHT, WRONG, TRACEBACK, HANG = VERDICTS = ("right", "wrong result", "traceback", "hang")


@dataclass(frozen=True)
class Outcome:
    """How a case ended, and with what message; ``kills`` counts the processes killed in it."""

    verdict: str
    detail: str = ""
    kills: int = 0


@dataclass(frozen=True)
class Case:
    """One try: its name contains everything it depends on, except the seed.

    Attributes:
        run: runs the case in an empty folder.
    """

    part: str
    kind: str
    number: int
    run: Callable[[Path], Outcome]

    @property
    def name(self) -> str:
        return f"{self.part}/{self.kind}/{self.number}"


@dataclass(frozen=True)
class Result:
    """What is stored about a case."""

    name: str
    seed: int
    verdict: str
    detail: str
    kills: int
    seconds: float

    @property
    def part(self) -> str:
        return self.name.split("/")[0]

    @property
    def kind(self) -> str:
        return self.name.split("/")[1]


class Kept:
    """Results in a file, one JSON object per line; a line that a killed process left incomplete is ignored.

    Args:
        file: created if it is missing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.results = {(result.name, result.seed): result for result in _read(file)}

    def add(self, result: Result) -> None:
        self.results[result.name, result.seed] = result
        content = self.file.read_bytes() if self.file.exists() else b""
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write("\n" * (content[-1:] not in (b"", b"\n")) + json.dumps(asdict(result)) + "\n")

    def of_seed(self, seed: int) -> list[Result]:
        return [result for result in self.results.values() if result.seed == seed]


def _read(file: Path) -> Iterator[Result]:
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            yield Result(**json.loads(line))
        except (ValueError, TypeError):
            continue


HEADS = ("part", "kind", "cases", "processes killed", "wrong results", "tracebacks", "hangs")


def table(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """Counts for each part and kind, with a total for each part."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.part, result.kind), []).append(result)
        groups.setdefault((result.part, "all"), []).append(result)
    order = sorted(groups, key=lambda group: (PARTS.index(group[0]), group[1] == "all", group[1]))
    rows = []
    for group in order:
        found = groups[group]
        counts = (sum(result.verdict == verdict for result in found) for verdict in VERDICTS[1:])
        rows.append((*group, str(len(found)), str(sum(result.kills for result in found)), *map(str, counts)))
    return rows
