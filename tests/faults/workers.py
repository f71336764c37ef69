"""Commands with ``--workers 3``, some of whose processes are killed by SIGKILL at a random moment."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_ft.cli import workers
from hf_ft.search.trials import _Search
from tests.faults.materials import Materials
from tests.faults.processes import run
from tests.faults.results import WRONG, Case, Outcome
from tests.faults.workloads import Wholes, Workload, judged

NUMBER = 20
WORKERS = 3
LIMIT = 400.0  # seconds for a command whose workers first import everything
TRIALS = (
    "select trials.state, user.value_json from trials join trial_user_attributes as user using (trial_id) "
    "where user.key = ?"
)


def cases(number: int, seed: int, materials: Materials, wholes: Wholes) -> Iterator[Case]:
    """This many rounds, three with a comparison for each one with a search."""
    few = ("--trials", "2", "--seeds", "3", "--strategies", "lp_ft,l2_sp,linear_probe")
    compared = Workload("compare", tuple(materials.compare(*few)), ())
    searched = Workload("search-blocks", tuple(materials.search("--scheme", "layer", "--search_seeds", "2")), ())
    for index in range(number):
        workload = searched if index % 4 == 3 else compared

        def made(folder: Path, workload: Workload = workload, index: int = index) -> Outcome:
            return _round(workload, wholes, folder, random.Random(f"{seed} {index}"))

        yield Case("workers", workload.name, index, made)


def _round(workload: Workload, wholes: Wholes, folder: Path, chance: random.Random) -> Outcome:
    """Kill one to three of the workers at once, and continue the command if the first was among them."""
    whole = wholes.get(workload)  # of one worker
    shared, note = [*workload.command, "--workers", str(WORKERS)], folder / "killed"
    victims = sorted(chance.sample(range(WORKERS), chance.randint(1, WORKERS)))
    moment = chance.uniform(0.0, 0.5) * whole.seconds
    while True:
        ended = run(shared, folder, first=partial(_prepare, folder, victims, moment), limit=LIMIT)
        if note.exists() or ended.code != 0:
            break
        shutil.rmtree(folder / "out")  # it had already ended
        moment *= 0.5
    where = f"workers {victims} killed after {moment:.2f} s: "
    if ended.killed:
        left = _left([int(process) for process in note.read_text().split()])
        if left:
            return Outcome(WRONG, f"{where}{len(left)} did not end with the first", len(victims))
        ended = run(chance.choice((shared, list(workload.command))), folder, limit=LIMIT)
    outcome = judged(ended, whole, folder, len(victims), where)
    again = [job for job, times in _trials(folder, "job", "COMPLETE").items() if times > 1]
    return replace(outcome, verdict=WRONG, detail=f"{where}done twice: {again}") if again else outcome


def _prepare(folder: Path, victims: list[int], moment: float) -> None:
    """In the first worker: make its first job wait for another worker, and kill some of them this much later."""
    os.environ["HF_DATASETS_CACHE"] = str(folder.with_name(f"{folder.name}.cache"))
    start, perform, processes = workers._start, _Search.perform, [os.getpid()]

    def started(*arguments: Any) -> Any:
        process = start(*arguments)
        processes.append(process.pid)
        return process

    def kill() -> None:
        time.sleep(moment)
        (folder / "killed").write_text(" ".join(map(str, processes)), encoding="utf-8")
        for victim in reversed(victims):  # the first is this process
            with suppress(ProcessLookupError):
                os.kill(processes[victim], signal.SIGKILL)

    def performed(search: _Search, *arguments: Any) -> Any:
        _Search.perform = perform
        while len(_trials(folder, "worker")) < 2 and len(processes) == WORKERS:
            time.sleep(0.05)
        threading.Thread(target=kill, daemon=True).start()
        return perform(search, *arguments)

    workers._start, _Search.perform = started, performed


def _trials(folder: Path, attribute: str, *states: str) -> Counter[str]:
    """The number of trials of each job or worker."""
    file = next((folder / "out").glob("*.db"))
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=60)) as opened:
        rows = opened.execute(TRIALS, (attribute,)).fetchall()
    return Counter(json.loads(value) for state, value in rows if not states or state in states)


def _left(processes: list[int]) -> list[int]:
    """The processes that are still running after a while."""
    end = time.monotonic() + 2 * workers.GRACE
    while left := [process for process in processes if Path(f"/proc/{process}").exists()]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return left
