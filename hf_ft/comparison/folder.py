"""The output folder of a comparison: its ownership, and the files of a running one."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from hf_ft.comparison.outputs import LOGITS
from hf_ft.core.context import State
from hf_ft.data.check_results import FILE
from hf_ft.engine.checkpoint import read_states, write_states
from hf_ft.engine.checkpoint_folders import files_written_whole
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.processes import process_name
from hf_ft.records import read_json

STORAGE = "compare.db"
OWN = ".comparison"  # files of a running comparison; marks the output folder as one of ours
OUTPUTS = "logits"  # folder of the outputs of final runs
SCORE, ORIGIN, COST = "score.json", "comparison.json", "cost.json"
SHOWN = 3  # foreign files named in a message


@dataclass(frozen=True)
class Kept:
    """Files in the output folder, shared by all workers; each file is written atomically.

    Only what a comparison wrote is ever replaced or deleted: everything in :data:`OWN`, and the winner's folder, which
    says which contender it came from, and the soup's.

    Args:
        folder: the output folder.
        every: whether all models are kept, for a soup, and not only the best final run of each contender.
    """

    folder: Path
    every: bool = False

    @property
    def own(self) -> Path:
        """The folder of files for this comparison alone."""
        return self.folder / OWN

    def check(self) -> None:
        """Make sure that nobody else's files are in the way.

        Raises:
            OptionError: if the output folder holds other files.
        """
        # Listed once: another worker may be claiming the folder, and it creates its mark before anything else.
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        names = {name for name in names if not name.startswith(FILE)}
        if names and not names & {OWN, STORAGE}:
            shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            raise OptionError(
                f"output_dir={str(self.folder)!r} holds files that no comparison wrote ({shown}): choose a new or an "
                "empty folder."
            )
        self._check_ours(self.best)
        if self.every:
            self._check_ours(self.soup)

    def claim(self) -> None:
        """Check the output folder, and make it one of ours."""
        self.check()
        self.own.mkdir(parents=True, exist_ok=True)

    def _check_ours(self, folder: Path) -> None:
        if folder.exists() and not (folder / ORIGIN).is_file():
            raise OptionError(f"{folder} was not written by a comparison: move it, or choose another output_dir.")

    def work(self, name: str) -> Path:
        """The working folder of one training run in this process."""
        return self.own / "work" / f"{name}-{process_name()}"

    def model(self, name: str, seed: int) -> Path:
        """The folder of the model of a training run, named like the winner's, since model cards show the name."""
        return self.own / "models" / name / f"seed-{seed}" / self.best.name

    @property
    def best(self) -> Path:
        """The winner's folder."""
        return self.folder / "best"

    @property
    def soup(self) -> Path:
        """The folder of the soup."""
        return self.folder / "soup"

    def states(self, name: str) -> tuple[dict[str, State], float] | None:
        """The measurements of a contender and their cost in compute seconds; None if missing or damaged."""
        folder = self.own / "states" / name
        try:
            return read_states(folder), float(json.loads((folder / COST).read_text(encoding="utf-8")))
        except (CheckpointError, OSError, ValueError, TypeError):
            return None

    def keep_states(self, name: str, states: Mapping[str, State], compute: float) -> None:
        """Save the measurements and their cost atomically."""
        with files_written_whole(self.own / "states" / name) as written:
            write_states(written, states)
            (written / COST).write_text(json.dumps(compute), encoding="utf-8")

    def keep_best(self, name: str, seed: int, score: float) -> None:
        """Keep only the best saved model of a contender, unless all are wanted; the lowest seed wins ties."""
        own = self.model(name, seed).parent
        with self.locked():
            self.mark(name, seed, score)
            if self.every:
                return
            ranks = {
                file.parent: (_score(file), -int(file.parent.name[5:])) for file in own.parent.glob(f"seed-*/{SCORE}")
            }
            for folder, rank in ranks.items():
                if rank < max(ranks.values()):
                    shutil.rmtree(folder, ignore_errors=True)

    def mark(self, name: str, seed: int, score: float) -> None:
        """Note that the model of a final run is complete."""
        (self.model(name, seed).parent / SCORE).write_text(json.dumps(score), encoding="utf-8")

    def keep_logits(self, name: str, seed: int) -> str:
        """Keep the outputs of a final run, which are next to its model; returns their file in the output folder."""
        written, file = (
            self.model(name, seed).with_name(LOGITS),
            self.folder / OUTPUTS / f"{name}-seed-{seed}.safetensors",
        )
        if not written.is_file():
            return ""
        file.parent.mkdir(exist_ok=True)
        os.replace(written, file)
        return file.relative_to(self.folder).as_posix()

    def saved(self, name: str, seed: int) -> Path | None:
        """Where the model of a final run is: in its own folder, or as the winner of an earlier call."""
        own = self.model(name, seed)
        return own if (own.parent / SCORE).is_file() else self.best if self._is_best(name, seed) else None

    def has_model(self, name: str, seed: int) -> bool:
        """Whether the model of a final run exists, in its own folder or as the winner of an earlier call."""
        return self.saved(name, seed) is not None

    def crown(self, name: str, seed: int) -> Path:
        """Make the model of a final run the winner; it is copied, since a continued comparison may choose another."""
        if not self._is_best(name, seed):
            copy = self.work("crowned")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.model(name, seed), copy)
            (copy / ORIGIN).write_text(json.dumps({"contender": name, "seed": seed}), encoding="utf-8")
            self.place(copy, self.best)
        return self.best

    def place(self, written: Path, folder: Path) -> None:
        """Move a folder to where the winner or the soup belongs, in place of one of ours."""
        self._check_ours(folder)
        if folder.exists():
            shutil.rmtree(folder)
        written.rename(folder)

    def clear(self) -> None:
        """Delete the files of killed processes and all models that are not wanted; no training run may be active."""
        for folder in ("work",) if self.every else ("models", "work"):
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
