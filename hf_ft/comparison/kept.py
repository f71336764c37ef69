"""What a comparison keeps on disk while it runs: what strategies measured, and models that may win."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_ft.checkpoint import CheckpointError, read_states, write_states
from hf_ft.config import State

SCORE, ORIGIN = "score.json", "comparison.json"


@dataclass(frozen=True)
class Kept:
    """Files in the output folder, which workers share; what is written appears there whole.

    Args:
        folder: the output folder.
    """

    folder: Path

    def work(self, name: str) -> Path:
        """A folder for one training of this process."""
        return self.folder / "work" / f"{name}-{os.getpid()}"

    def model(self, name: str, seed: int) -> Path:
        """Where a contender's final run is saved: in a folder of the name that the winner has, which its card tells."""
        return self.folder / "models" / name / f"seed-{seed}" / self.best.name

    @property
    def best(self) -> Path:
        """Where the winner is."""
        return self.folder / "best"

    def states(self, name: str) -> dict[str, State] | None:
        """What a contender measured; None if it is not there, or damaged."""
        try:
            return read_states(self.folder / "states" / name)
        except (CheckpointError, OSError):
            return None

    def keep_states(self, name: str, states: Mapping[str, State]) -> None:
        if not states:
            return
        folder = self.folder / "states" / name
        partial = folder.with_name(f"{name}-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_states(partial, states)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def keep_best(self, name: str, seed: int, score: float) -> None:
        """Of a contender's saved models keep the best: of equals that of the lowest seed."""
        own = self.model(name, seed).parent
        (own / SCORE).write_text(json.dumps(score), encoding="utf-8")
        ranks = {}
        for file in own.parent.glob(f"seed-*/{SCORE}"):
            ranks[file.parent] = (json.loads(file.read_text(encoding="utf-8")), -int(file.parent.name[5:]))
        best = max(ranks.values())
        for folder, rank in ranks.items():  # another worker deletes by the same order: never the best
            if rank < best:
                shutil.rmtree(folder, ignore_errors=True)

    def has_model(self, name: str, seed: int) -> bool:
        """Whether a final run's model is there: as it was saved, or as the winner of an earlier call."""
        return self._is_best(name, seed) or (self.model(name, seed).parent / SCORE).is_file()

    def crown(self, name: str, seed: int) -> Path:
        """Make a final run's model the winner, and delete the others."""
        saved = self.model(name, seed)
        if saved.is_dir():
            (saved / ORIGIN).write_text(json.dumps({"contender": name, "seed": seed}), encoding="utf-8")
            shutil.rmtree(self.best, ignore_errors=True)
            saved.rename(self.best)
        for folder in ("models", "work"):
            shutil.rmtree(self.folder / folder, ignore_errors=True)
        return self.best

    def _is_best(self, name: str, seed: int) -> bool:
        try:
            origin = json.loads((self.best / ORIGIN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return origin == {"contender": name, "seed": seed}
