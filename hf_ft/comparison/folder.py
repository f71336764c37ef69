"""The output folder of a comparison: whose it is, and the files of a running one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from hf_ft.core.context import State
from hf_ft.engine.checkpoint import read_states, write_states
from hf_ft.engine.checkpoint_folders import files_written_whole
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.processes import process_name
from hf_ft.records import read_json

STORAGE = "compare.db"
OWN = ".comparison"  # files of a running comparison; marks the output folder as one of ours
SCORE, ORIGIN = "score.json", "comparison.json"
SHOWN = 3  # foreign files named in a message


@dataclass(frozen=True)
class Kept:
    """Files in the output folder, shared by all workers; each file is written atomically.

    Only what a comparison wrote is ever replaced or deleted: everything in :data:`OWN`, and the winner's folder, which
    says which contender it came from.

    Args:
        folder: the output folder.
    """

    folder: Path

    @property
    def own(self) -> Path:
        """The folder of files for this comparison alone."""
        return self.folder / OWN

    def check(self) -> None:
        """Make sure that nobody else's files are in the way.

        Raises:
            OptionError: if the output folder holds other files.
        """
        # Listed once: another worker may be claiming the folder, and creates its mark before anything else.
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if names and not names & {OWN, STORAGE}:
            shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            raise OptionError(
                f"output_dir={str(self.folder)!r} holds files that no comparison wrote ({shown}): choose a new or an "
                "empty folder."
            )
        self._check_best()

    def claim(self) -> None:
        """Check the output folder, and make it one of ours."""
        self.check()
        self.own.mkdir(parents=True, exist_ok=True)

    def _check_best(self) -> None:
        if self.best.exists() and not (self.best / ORIGIN).is_file():
            raise OptionError(f"{self.best} was not written by a comparison: move it, or choose another output_dir.")

    def work(self, name: str) -> Path:
        """The working folder of one training in this process."""
        return self.own / "work" / f"{name}-{process_name()}"

    def model(self, name: str, seed: int) -> Path:
        """The folder of a contender's final run, named like the winner's, since model cards show the name."""
        return self.own / "models" / name / f"seed-{seed}" / self.best.name

    @property
    def best(self) -> Path:
        """The winner's folder."""
        return self.folder / "best"

    def states(self, name: str) -> dict[str, State] | None:
        """The measurements of a contender; None if missing or damaged."""
        try:
            return read_states(self.own / "states" / name)
        except (CheckpointError, OSError):
            return None

    def keep_states(self, name: str, states: Mapping[str, State]) -> None:
        """Save the measurements atomically."""
        with files_written_whole(self.own / "states" / name) as written:
            write_states(written, states)

    def keep_best(self, name: str, seed: int, score: float) -> None:
        """Keep only the best saved model of a contender; the lowest seed wins ties."""
        own = self.model(name, seed).parent
        with self.locked():
            (own / SCORE).write_text(json.dumps(score), encoding="utf-8")
            ranks = {
                file.parent: (_score(file), -int(file.parent.name[5:])) for file in own.parent.glob(f"seed-*/{SCORE}")
            }
            for folder, rank in ranks.items():
                if rank < max(ranks.values()):
                    shutil.rmtree(folder, ignore_errors=True)

    def has_model(self, name: str, seed: int) -> bool:
        """Whether the model of a final run exists, in its own folder or as the winner of an earlier call."""
        return self._is_best(name, seed) or (self.model(name, seed).parent / SCORE).is_file()

    def crown(self, name: str, seed: int) -> Path:
        """Make the model of a final run the winner; it is copied, since a continued comparison may choose another."""
        if not self._is_best(name, seed):
            copy = self.work("crowned")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.model(name, seed), copy)
            (copy / ORIGIN).write_text(json.dumps({"contender": name, "seed": seed}), encoding="utf-8")
            self._check_best()
            if self.best.exists():
                shutil.rmtree(self.best)
            copy.rename(self.best)
        return self.best

    def clear(self) -> None:
        """Delete all models except the winner, and the files of killed processes; no training may be running."""
        for folder in ("models", "work"):
            shutil.rmtree(self.own / folder, ignore_errors=True)

    def locked(self) -> FileLock:
        """A lock for comparing or replacing files of several workers."""
        return FileLock(self.own / "lock")

    def _is_best(self, name: str, seed: int) -> bool:
        try:
            origin = read_json(self.best / ORIGIN)
        except (OSError, CheckpointError):
            return False
        return origin == {"contender": name, "seed": seed}


def _score(file: Path) -> float:
    """The score of a saved model; the worst if it cannot be read, as after a worker was killed."""
    try:
        return float(read_json(file))
    except (CheckpointError, TypeError, ValueError):
        return -math.inf
