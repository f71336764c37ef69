"""Commands killed by SIGKILL at random moments, once or several times, that then continue to their end."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.faults.materials import Materials
from tests.faults.processes import Ended, run
from tests.faults.results import Case, Outcome
from tests.faults.workloads import Wholes, Workload, failed, judged, workloads

NUMBER = 100
TIMES = (1, 1, 1, 2, 3)  # the maximum number of kills per run


def cases(number: int, seed: int, materials: Materials, wholes: Wholes) -> Iterator[Case]:
    """This many kills, over all workloads in turn."""
    chosen = workloads(materials)
    for index in range(number):
        workload = chosen[index % len(chosen)]

        def made(folder: Path, workload: Workload = workload, index: int = index) -> Outcome:
            return _killed(workload, wholes, folder, random.Random(f"{seed} {index}"))

        yield Case("kills", workload.name, index, made)


def _killed(workload: Workload, wholes: Wholes, folder: Path, chance: random.Random) -> Outcome:
    whole = wholes.get(workload)
    moments = [chance.uniform(0.02, 1.0) * whole.seconds for _ in range(chance.choice(TIMES))]
    kills, where = 0, f"killed after {', '.join(f'{moment:.2f}' for moment in moments)} s: "
    while not kills:
        ended, kills = _tried(workload, folder, moments)
        if failed(ended, (0, -9)) is None and not kills:  # it had already ended
            shutil.rmtree(folder / "out")
            moments = [0.8 * moment for moment in moments]
        elif not kills:
            break
    if ended.killed:
        ended = run(workload.goes_on(folder), folder)
    return judged(ended, whole, folder, kills, where)


def _tried(workload: Workload, folder: Path, moments: list[float]) -> tuple[Ended, int]:
    """Run until killed, and continue until killed again."""
    kills = 0
    for moment in moments:
        ended = run(workload.goes_on(folder), folder, kill_after=moment)
        if not ended.killed:
            break
        kills += 1
    return ended, kills
