"""Of a process it is told that it is gone only if that is certain."""

import os
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


def test_a_number_given_to_another_process():
    place, number, started = process_name().split("-")
    assert is_gone(f"{place}-{number}-{int(started) + 1}")


def test_what_says_nothing_here(monkeypatch):
    _, number, started = process_name().split("-")
    elsewhere = f"{'0' * 12}-{2**22 + 1}-{started}"
    for name in ("", "None", str(2**22 + 1), elsewhere, f"{number}-{started}", "x-1-2"):
        assert not is_gone(name)
    monkeypatch.setattr(processes, "_start", lambda number: None)  # of another user, where /proc hides it
    assert not is_gone(f"{processes._place()}-1-5") and process_name() == number
