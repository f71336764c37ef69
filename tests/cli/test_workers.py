"""``--workers``: what each worker gets, how all of them end, what is refused, and cores that others need."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from hf_ft.cli import cores, main, workers
from hf_ft.cli.cores import crowding, shared, take_share
from hf_ft.cli.workers import check_workers, other_workers
from hf_ft.comparison.worker import visible_gpus
from hf_ft.errors import OptionError

# A worker that reports that it has started, and how it was ended.
WAITS = """
import sys, time
from pathlib import Path
from hf_ft.cli.workers import end_with_parent
end_with_parent()
place = Path(sys.argv[1], __import__("os").environ["RANK"])
try:
    place.write_text("here")  # from here on, it may be interrupted
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.1)  # a second interrupt would disturb what is done here
    place.write_text("interrupted")
"""
# A process that starts two of them and waits. Background processes may have been set to ignore SIGINT.
STARTS = """
import signal, sys, time
from hf_ft.cli import workers
signal.signal(signal.SIGINT, signal.default_int_handler)
workers.GRACE = 2.0
with workers.other_workers(3, [sys.executable, "-c", *sys.argv[1:]], []):
    time.sleep(60)
"""


@pytest.fixture
def environment(monkeypatch):
    """The environment of a user who has set nothing, on four cores."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for module in (cores, workers):
        monkeypatch.setattr(module, "cores", lambda: 4)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return monkeypatch


def until(condition, told=lambda: ""):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited too long {told()}"
        time.sleep(0.02)


def ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def said(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_each_worker_gets_its_share(environment, capsys):
    command = "import os; print(*(os.environ.get(n) for n in ('RANK', 'OMP_NUM_THREADS', 'OMP_WAIT_POLICY', {!r})))"
    for gpus, name in (([], "LOCAL_RANK"), (["3", "GPU-5"], "CUDA_VISIBLE_DEVICES")):
        with other_workers(2, [sys.executable, "-c", command.format(name)], gpus) as others:
            assert others.wait()
            for reader in others._readers:
                reader.join()
        printed = capsys.readouterr()
        assert printed.err == f"worker 2: 1 2 PASSIVE {gpus[1] if gpus else None}\n"
        assert printed.out == f"workers: 2, {'a GPU each' if gpus else '2 threads each'}\n\n"


def test_it_imports_what_this_process_does(tmp_path, environment, capsys):
    (tmp_path / "torch.py").write_text("print('not this one')")
    environment.chdir(tmp_path)
    command = workers.same_command("list", [])
    assert command == [sys.executable, "-m", "hf_ft", "list", "--workers", "1"]
    found = "import importlib.util as u; print(u.find_spec('torch').origin); exit(3)"
    with other_workers(2, [sys.executable, "-c", found], []) as others:
        others.wait()
        for reader in others._readers:
            reader.join()
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(os.path.join("torch", "__init__.py"))
    assert second == "note: worker 2 ended with status 3; the others take over its work"


def test_one_worker_is_this_process():
    with other_workers(1, ["no such command"], []) as others:
        assert not others.wait()


def test_all_end_with_the_block_and_clean_up(tmp_path, environment):
    with other_workers(3, [sys.executable, "-c", WAITS, str(tmp_path)], []) as others:
        until(lambda: said(tmp_path) == {"1": "here", "2": "here"})
        others.processes[0].kill()
    assert said(tmp_path) == {"1": "here", "2": "interrupted"}
    assert [process.returncode for process in others.processes] == [-signal.SIGKILL, 0]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_all_end_with_the_process_that_started_them(by, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", STARTS, WAITS, str(tmp_path)], stderr=subprocess.DEVNULL)
    until(lambda: said(tmp_path) == {"1": "here", "2": "here"})
    process.send_signal(by)
    process.wait()
    until(lambda: said(tmp_path) == {"1": "interrupted", "2": "interrupted"}, lambda: said(tmp_path))


def test_one_that_swallows_the_interrupt_ends_with_the_process_that_started_it(tmp_path):
    swallows = WAITS.replace('place.write_text("interrupted")', "time.sleep(60)")
    swallows = "from hf_ft.cli import workers; workers.GRACE = 0.1\n" + swallows
    process = subprocess.Popen([sys.executable, "-c", STARTS, swallows, str(tmp_path)], stderr=subprocess.DEVNULL)
    until(lambda: said(tmp_path) == {"1": "here", "2": "here"})
    others = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    until(lambda: all(ended(other) for other in others))


def test_a_second_interrupt_leaves_none_behind(tmp_path):
    """One of them hangs, so that the first is still waiting for it when the second interrupt comes."""
    process = subprocess.Popen([sys.executable, "-c", STARTS, WAITS, str(tmp_path)], stderr=subprocess.DEVNULL)
    until(lambda: said(tmp_path) == {"1": "here", "2": "here"})
    others = psutil.Process(process.pid).children()
    os.kill(others[0].pid, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    until(lambda: "interrupted" in said(tmp_path).values())
    process.send_signal(signal.SIGINT)
    process.wait()
    left = [other for other in others if other.is_running()]
    for other in left:
        other.kill()
    assert not left


def test_one_that_does_not_end_is_killed(tmp_path, environment):
    environment.setattr(workers, "GRACE", 0.1)
    stubborn = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); open(sys.argv[1], 'w'); time.sleep(60)"
    with other_workers(2, [sys.executable, "-c", stubborn, str(tmp_path / "here")], []) as others:
        until((tmp_path / "here").exists)
    assert others.processes[0].returncode == -signal.SIGKILL


def test_the_first_takes_its_share_before_torch_is_imported(environment):
    for arguments, threads in (("--workers 3", "1"), ("--workers=2 --seeds 3", "2"), ("--workers 9", "1")):
        take_share(["compare", *arguments.split()])
        assert (os.environ.pop("OMP_NUM_THREADS"), os.environ.pop("OMP_WAIT_POLICY")) == (threads, "PASSIVE")
    for arguments in ("", "--workers 1", "--workers", "--workers x", "--seeds 2"):
        take_share(["compare", *arguments.split()])
        assert not {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"} & {*os.environ}
    os.environ["OMP_NUM_THREADS"] = "3"
    assert shared(2) == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}  # what the user has set stays


@pytest.mark.parametrize(
    ("number", "gpus", "given", "message"),
    [
        (0, 0, {}, "--workers 0: there must be at least 1"),
        (
            3,
            2,
            {"OMP_NUM_THREADS": "1"},
            "--workers 3 exceeds the number of GPUs, 2.*Set --workers 2, or add",
        ),
        (2, 0, {"WORLD_SIZE": "3"}, "a launcher has started 3 processes .*: leave --workers out"),
        (2, 0, {}, "Give --workers 2 on the command line"),
    ],
)
def test_refused(number, gpus, given, message, environment):
    os.environ.update(given)
    with pytest.raises(OptionError, match=message):
        check_workers(number, gpus)


@pytest.mark.parametrize(
    ("visible", "number", "names"),
    [
        (None, 2, ["0", "1"]),
        ("3,GPU-5", 2, ["3", "GPU-5"]),
        ("1,-1,2", 1, ["1"]),
        ("", 0, []),
        ("0,1", 0, []),
        (None, 0, []),
    ],
)
def test_gpus_by_name(visible, number, names, environment):
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    environment.setattr("torch.cuda.device_count", lambda: number)
    assert visible_gpus() == names


def test_more_workers_than_cores(environment, capsys):
    os.environ["OMP_NUM_THREADS"] = "1"
    for number, gpus in ((4, 0), (8, 8), (1, 0)):
        check_workers(number, gpus)
    assert not capsys.readouterr().err
    check_workers(5, 0)
    assert "--workers 5 exceeds the number of cores, 4" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "search-blocks"])
def test_refused_before_anything_is_read(command, environment, tmp_path, capsys):
    environment.setattr(f"hf_ft.cli.{command.replace('-', '_')}.visible_gpus", lambda: ["0", "1"])
    where = ["--model", "mobilenet_v2", "--dataset", "elpv", "--output_dir", str(tmp_path / "out")]
    for more, message in (("--workers 0", "at least 1"), ("--workers 3", "Set --workers 2, or add --use_cpu true")):
        assert main([command, *where, *more.split()]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("workers: 2\n")
    os.environ.pop("OMP_NUM_THREADS", None)
    assert main([command, str(tmp_path / "run.yaml"), *where, "--use_cpu", "true"]) == 2
    assert "Give --workers 2 on the command line" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_search_in_memory_is_not_shared(environment, tmp_path, capsys):
    where = ["--model", "mobilenet_v2", "--dataset", "elpv", "--output_dir", str(tmp_path / "out")]
    assert main(["search-blocks", *where, "--use_cpu", "true", "--storage", "memory", "--workers", "2"]) == 2
    assert "--storage memory cannot be shared by --workers 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("threads", "load", "machine", "policy", "advice"),
    [
        (2, 2.0, 2, "", "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE"),
        (2, 1.0, 2, "", "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE"),
        (16, 10.2, 16, "active", "OMP_NUM_THREADS=6 "),
        (2, 0.4, 2, "", ""),  # a browser
        (16, 2.0, 16, "", ""),
        (1, 2.0, 2, "", ""),  # nothing remains to be set
        (2, 2.0, 2, "passive", ""),
    ],
)
def test_starting_a_second_training_run_warns(threads, load, machine, policy, advice):
    text = crowding(threads, load, machine, {"OMP_WAIT_POLICY": policy})
    assert bool(text) == bool(advice) and advice in text


@pytest.mark.parametrize(
    ("command", "device"), [("train", "cpu"), ("compare", "cpu"), ("search_blocks", "cpu"), ("train", "cuda")]
)
def test_it_warns_before_training_on_a_cpu(command, device, environment, tmp_path, capsys):
    def train(*_, **__):
        raise OptionError("training")

    environment.setattr(cores, "load", lambda: 40.0)
    environment.setattr(os, "cpu_count", lambda: 8)
    environment.setattr("torch.get_num_threads", lambda: 8)
    args = SimpleNamespace(device=SimpleNamespace(type=device))
    data, trainer = SimpleNamespace(checks=None), SimpleNamespace(args=args, train=train, model=None, context=train)
    runner = SimpleNamespace(common=SimpleNamespace(device=device), run=train)
    module = f"hf_ft.cli.{command}"
    if command == "compare":
        made = SimpleNamespace(data=data, runner=runner, estimate=lambda: "")
        environment.setattr(f"{module}._prepare", lambda *_: made)
    else:
        environment.setattr(f"{module}.make", lambda _: SimpleNamespace(data=data, trainer=trainer))
    if command != "search_blocks":
        environment.setattr(f"{module}._announce", lambda *_: None)
    where = ["--model", "mobilenet_v2", "--dataset", "elpv", "--output_dir", str(tmp_path / "out")]
    assert main([command.replace("_", "-"), *where]) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert "error: training" in error and len(notes) == (device == "cpu")
    assert all(note.startswith("note: the machine is busy: its load is 40.0 on 8 cores") for note in notes)


def test_the_load_is_that_of_other_processes():
    assert 0 <= cores.load() < 10_000
