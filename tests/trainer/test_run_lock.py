"""Two training runs never share an output folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from transformers import TrainerCallback

from hf_ft import OptionError
from hf_ft.engine.checkpoint_folders import checkpoints
from hf_ft.processes import process_name
from hf_ft.testing import tiny_resnet, train
from hf_ft.testing.training import make_trainer
from hf_ft.trainer.run_lock import LOCK, alone_in
from tests.forked import python

WORKER = Path(__file__).with_name("locked_worker.py")
SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def held(folder, saves=True):
    return alone_in(folder, saves, Accelerator(cpu=True))


def test_a_second_training_is_refused_before_it_touches_anything(tmp_path):
    train(tiny_resnet(), "full", tmp_path, **SAVING)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with held(tmp_path):
        for options in ({"resume": True}, {}):
            with pytest.raises(OptionError, match=f"output_dir='{tmp_path}' is in use by another training"):
                train(tiny_resnet(), "full", tmp_path, **SAVING, **options)
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert {path: time for path, time in after.items() if path.name != LOCK} == before
    train(tiny_resnet(), "full", tmp_path, resume=True, **SAVING)


def test_it_is_held_while_training_and_leaves_no_file(tmp_path):
    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(OptionError, match="in use"), held(tmp_path):
                pass
            looked.append(state.global_step)

    looked = []
    trainer = make_trainer(tiny_resnet(), "full", tmp_path, **SAVING)
    trainer.add_callback(Looks())
    trainer.train()
    assert looked == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_it_is_released_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), held(tmp_path):
        raise RuntimeError("out of memory")
    with held(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_a_run_that_saves_nothing_needs_no_lock(tmp_path):
    with held(tmp_path):
        train(tiny_resnet(), "full", tmp_path, max_steps=1)


def test_a_killed_process_holds_nothing(tmp_path):
    script = (
        "import sys\nfrom filelock import FileLock\n"
        "lock = FileLock(sys.argv[1]).acquire()\nprint('held', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(OptionError, match="in use"), held(tmp_path):
            pass
        other.kill()
    with held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_only_what_no_living_process_writes_is_deleted(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    machine, number, started = process_name().split("-")
    gone, earlier = f"{machine}-{dead.pid}-{started}", f"{machine}-{number}-1"
    started_at = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    names = [f"incomplete-{process}-checkpoint-1" for process in (gone, process_name(), earlier)]
    living = f"incomplete-{machine}-{os.getppid()}-{started_at}-checkpoint-1"
    elsewhere = f"incomplete-{'0' * 12}-{dead.pid}-{started}-checkpoint-1"
    of_a_user = {"incomplete-drawings", f"incomplete-{gone}-notes", f"incomplete-{dead.pid}"}
    for name in [*names, f"incomplete-{gone}-files", f"incomplete-{gone}-old-member_0", living, elsewhere, *of_a_user]:
        (tmp_path / name).mkdir()
    with held(tmp_path):
        assert {path.name for path in tmp_path.glob("incomplete-*")} == {living, elsewhere, *of_a_user}


@pytest.mark.slow
def test_all_ranks_are_refused(tmp_path):
    with held(tmp_path / "held"):
        done = python(WORKER, tmp_path / "own", tmp_path / "held", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert f"rank {rank}: output_dir='{tmp_path / 'held'}' is in use" in done.stdout
    assert [path.name for path in checkpoints(tmp_path / "own")] == ["checkpoint-1", "checkpoint-2"]
    assert len(list(tmp_path.glob("own/checkpoint-2/rng_state_*.pth"))) == 2
    assert not list(tmp_path.glob("own/incomplete-*")) and not (tmp_path / "own" / LOCK).exists()
