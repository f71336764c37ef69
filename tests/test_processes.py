"""A process is reported as gone only if that is certain."""

import os
import shutil
import subprocess
import sys

import pytest

from hf_ft import processes
from hf_ft.processes import is_gone, process_name

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def test_this_process_is_there():
    name = process_name()
    assert name == process_name() and f"-{os.getpid()}-" in name and not is_gone(name)


def test_a_process_that_ended_is_gone_also_before_its_parent_knows():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    place, started = processes._place(), processes._start(process.pid)
    name = f"{place}-{process.pid}-{started}"
    assert not is_gone(name)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it ended, and stays a zombie
    assert is_gone(name)
    process.wait()
    assert is_gone(name)


def test_a_number_reused_by_another_process():
    place, number, started = process_name().split("-")
    assert is_gone(f"{place}-{number}-{int(started) + 1}")


def test_records_that_mean_nothing_here(monkeypatch):
    _, number, started = process_name().split("-")
    elsewhere = f"{'0' * 12}-{2**22 + 1}-{started}"
    for name in ("", "None", str(2**22 + 1), elsewhere, f"{number}-{started}", "x-1-2"):
        assert not is_gone(name)
    monkeypatch.setattr(processes, "_start", lambda number: None)  # of another user, whom /proc hides
    assert not is_gone(f"{processes._place()}-1-5") and process_name() == number


PRINTED = "from hf_ft.processes import process_name; print(process_name(), flush=True); input()"


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-pf", "true"], capture_output=True).returncode != 0,
    reason="needs namespaces of process numbers: root, and unshare of util-linux",
)
@pytest.mark.parametrize("proc", ["its own", "the machine's"])
def test_containers_of_one_machine_and_one_name(proc):
    """The first process of a container is 1, like one of ours; its other numbers do not exist here."""
    own = ["--mount-proc"] if proc == "its own" else []
    with subprocess.Popen(
        ["unshare", "-pf", *own, sys.executable, "-c", PRINTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as container:
        name = container.stdout.readline().strip()
        inside = name.split("-")
        assert inside[1:2] == ["1"] if own else name == "1"
        assert not is_gone(name)
        if own:
            assert inside[0] != process_name().split("-")[0]
            assert not is_gone(f"{inside[0]}-{2**22 + 1}-{inside[2]}")
        container.communicate("\n")
    assert not is_gone(name)  # it is, which cannot be seen from here
