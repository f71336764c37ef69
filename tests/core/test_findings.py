"""What a strategy found, as files."""

import importlib.util
import json

import pytest

from hf_ft import FTConfig, State
from hf_ft.core.findings import Findings, Table


def drawn(path):
    path.write_text("drawn")


FOUND = Findings("said", files={"a.json": {"b": [1]}, "a.md": "c\n"}, plots={"a.png": drawn})


def test_files_and_plots_are_written(tmp_path):
    assert FOUND.write(tmp_path / "new") == ["a.json", "a.md", "a.png"]
    written = {file.name: file.read_text() for file in (tmp_path / "new").iterdir()}
    assert json.loads(written["a.json"]) == {"b": [1]}
    assert (written["a.md"], written["a.png"]) == ("c\n", "drawn")


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert FOUND.write(tmp_path) == ["a.json", "a.md"]
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", "a.md"}


def test_a_sentence_alone_is_a_finding():
    class Speaking(FTConfig):
        def learned(self, state):
            return f"saw {state.info['seen']}"

    assert Speaking().findings(State(info={"seen": 3})) == Findings("saw 3")


@pytest.mark.parametrize("caption", ["", "numbers"])
def test_it_is_printed(caption, tmp_path, capsys):
    from hf_ft.cli.findings import show_findings

    show_findings(Findings(short=(Table(caption, ("name", "value"), (("a", "1"),)),)), tmp_path)
    title = "\nnumbers:\n\n" if caption else "\n"
    assert capsys.readouterr().out == f"{title}name  value\n----  -----\na     1\n"
    assert not list(tmp_path.iterdir())
