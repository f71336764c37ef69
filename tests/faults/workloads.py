"""What is killed: training with each strategy, both searches and a comparison; and what each leaves otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hf_ft.core.config import strategies
from hf_ft.engine.checkpoint_folders import checkpoints
from tests.faults.lasting import differences, lasting
from tests.faults.materials import Materials
from tests.faults.processes import Ended, run
from tests.faults.results import HANG, RIGHT, TRACEBACK, WRONG, Outcome

STEPS = 7  # an epoch has four
SAVING = ("--save_strategy", "steps", "--save_steps", "2", "--logging_strategy", "steps", "--logging_steps", "1")
BEST = ("--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "true", "--save_total_limit", "2")
LAST = ("--eval_strategy", "no")
AUGMENTED, PLAIN = ("--augment", "basic"), ("--augment", "none")  # frozen parts are computed once for plain images
FEW = ("--blockwise.search_epochs", "1", "--blockwise.scheme", "stage")
SWARM = ("--amcf.particles", "2", "--amcf.iterations", "1", "--amcf.search_epochs", "1")


@dataclass(frozen=True)
class Workload:
    """A command that can be killed.

    Attributes:
        command: the command that starts it.
        resumes: the arguments added to continue from a checkpoint; empty if the same command continues by itself.
    """

    name: str
    command: tuple[str, ...]
    resumes: tuple[str, ...] = ("--resume_from_checkpoint", "true")

    def goes_on(self, folder: Path) -> list[str]:
        """The command that continues with what is in a folder."""
        return [*self.command, *(self.resumes if checkpoints(folder / "out") else ())]


def workloads(materials: Materials) -> list[Workload]:
    """All workloads, in an order in which neighbours differ."""
    trainings = []
    for number, name in enumerate(strategies()):
        more = [*SAVING, *(LAST if number % 3 == 2 else BEST), *(AUGMENTED if number % 2 else PLAIN)]
        trainings.append(_training(name, more, materials))
    search = materials.train("--strategy", "blockwise", *FEW, *SAVING, *BEST, steps=STEPS)
    swarm = materials.train_together(*SWARM, *SAVING, *LAST, steps=STEPS)
    others = [
        Workload("search-blocks", tuple(materials.search("--scheme", "stage")), ()),
        Workload("blockwise with its search", tuple(search)),
        Workload("amcf with its search", tuple(swarm)),
        Workload("compare", tuple(materials.compare()), ()),
        Workload(
            "compare, tuned", tuple(materials.compare("--trials", "2", "--seeds", "2", "--strategies", "lp_ft")), ()
        ),
    ]
    return others + trainings


def _training(name: str, more: list[str], materials: Materials) -> Workload:
    options = {
        "blockwise": ["--blockwise.block", "stage1"],
        "amcf": ["--amcf.frozen", "2,1"],
        "co_tuning": ["--source_dataset", str(materials.photos), "--co_tuning.source_label_map", "by_name"],
        "soft": ["--source_dataset", str(materials.photos), "--soft.source_label_map", "by_name"],
    }.get(name, [])
    if name == "amcf":
        return Workload(name, tuple(materials.train_together(*options, *more, steps=STEPS)))
    return Workload(name, tuple(materials.train("--strategy", name, *options, *more, steps=STEPS)))


@dataclass(frozen=True)
class Whole:
    """What an undisturbed workload leaves."""

    content: dict[str, Any]
    seconds: float


class Wholes:
    """Undisturbed runs, each made once.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.get = cache(self._get)

    def _get(self, workload: Workload) -> Whole:
        folder = self.folder / workload.name
        folder.mkdir(parents=True)
        ended = run(workload.command, folder)
        if ended.code != 0:
            raise RuntimeError(f"{workload.name} ended with {ended.code}:\n{ended.err[-2000:]}")
        content = lasting(folder / "out")
        shutil.rmtree(folder)
        return Whole(content, ended.seconds)


def judged(ended: Ended, whole: Whole, folder: Path, kills: int, where: str = "") -> Outcome:
    """Whether a run that was killed and continued to its end left what it should."""
    failure = failed(ended, (0,))
    if failure is not None:
        return Outcome(failure[0], f"{where}{failure[1]}", kills)
    found = differences(whole.content, lasting(folder / "out"))
    return Outcome(WRONG if found else RIGHT, where + "; ".join(found[:5]), kills)


def failed(ended: Ended, allowed: tuple[int, ...]) -> tuple[str, str] | None:
    """The verdict on a command that did not end as it should, and its last output."""
    last = " | ".join(ended.err.strip().splitlines()[-3:])[-600:]
    if ended.code is None:
        return HANG, f"after {ended.seconds:.0f} s: {last}"
    if "Traceback (most recent call last)" in ended.err:
        return TRACEBACK, last
    return None if ended.code in allowed else (WRONG, f"exit status {ended.code}: {last}")


Make = Callable[[Path], Outcome]
