"""A process that works on a study, and records each evaluation that it starts as ``key pid``."""

import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

from hf_ft.search.storage import open_storage
from hf_ft.search.study import open_study
from hf_ft.search.trials import Job, run_trials

# Forked: a new interpreter would take seconds to import torch.
_context = multiprocessing.get_context("fork")


def jobs(number):
    return [
        Job(f"stage{index % 4}/seed{index}", {"block": f"stage{index % 4}", "seed": index}) for index in range(number)
    ]


def work(folder, storage, number, seconds, heartbeat, start=0.0, signals=(), machine=None, waits=False):
    """Run the jobs; in each evaluation, send this process the next of ``signals``, if there is one.

    Args:
        machine: name of the machine that this process pretends to run on.
        waits: whether evaluations wait until another worker has sent itself a signal.
    """
    pending = list(signals)
    if machine is not None:
        mock.patch("hf_ft.processes._place", lambda: machine).start()

    def evaluate(job, report):
        with open(folder / "log", "a") as log:
            log.write(f"{job.key} {os.getpid()}\n")
        while waits and not (folder / "signalled").exists():
            time.sleep(0.02)
        if pending and (now := pending.pop(0)):
            (folder / "signalled").touch()
            os.kill(os.getpid(), now)
        time.sleep(seconds)
        return float(job.params["seed"]), {"pid": os.getpid()}

    time.sleep(max(0.0, start - time.time()))
    outcomes = run_trials(
        jobs(number), evaluate, storage=storage, name="study", signature={"model": "a"}, heartbeat=heartbeat
    )
    (folder / f"done{os.getpid()}").write_text("\n".join(f"{o.key} {o.info['pid']}" for o in outcomes.values()))


def open_all(folder, storages, start):
    """Open new storages, each at the same moment as other processes."""
    for index, storage in enumerate(storages):
        while time.time() < start + 0.3 * index:
            pass
        open_study(open_storage(storage), "study", None)


def _main(target, folder, *args, **kwargs):
    try:
        target(folder, *args, **kwargs)
    except BaseException:
        traceback.print_exc()
        (folder / f"error{os.getpid()}").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def start(folder: Path, *args, target=work, **kwargs):
    process = _context.Process(target=_main, args=(target, folder, *args), kwargs=kwargs, daemon=True)
    process.start()
    return process
