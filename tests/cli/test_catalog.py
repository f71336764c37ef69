"""`hf-ft list` and `describe`: the file they read agrees with the classes; third-party strategies are also shown."""

from dataclasses import dataclass

import pytest

from hf_ft.cli import main
from hf_ft.cli.catalog import FILE, describe, entries
from hf_ft.cli.entries import as_file, entry_of
from hf_ft.core import config as registry
from hf_ft.core.config import FTConfig, Paper, config_class, register
from hf_ft.core.options import option
from hf_ft.core.plan import Plan
from hf_ft.core.recommended import LearningRate


def test_the_file_is_up_to_date(shipped_strategies):
    assert FILE.read_bytes() == as_file(registry.strategies()).encode(), "run `python -m docs.tools.tables`"


def test_only_plain_text_is_shown(shipped_strategies):
    for name, entry in entries().items():
        assert entry == entry_of(config_class(name))
        values = [value for part in (*entry.options, *entry.recommended) for value in part.values()]
        assert all(isinstance(value, str) for value in values)


@pytest.fixture
def theirs(monkeypatch):
    monkeypatch.setattr(registry, "_CONFIGS", registry.strategies())

    @register("theirs")
    @dataclass(frozen=True, kw_only=True)
    class Theirs(FTConfig):
        """Do as they do.

        In their own way.
        """

        paper = Paper("One, Two", "Theirs", "Conf 2020")
        recommended = {"learning_rate": LearningRate(0.5, "paper")}
        often: int | None = option(None, "How often.", range="[1, inf)")

        def plan(self, model, state):
            return Plan()

    return Theirs


def test_a_third_party_strategy_is_listed_and_described(theirs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["list"]) == 0
    *_, last = (line for line in capsys.readouterr().out.split("\n\n")[0].splitlines() if line)
    assert last.split() == ["theirs", "Do", "as", "they", "do", "(One", "and", "Two,", "Conf", "2020)"]
    assert main(["describe", "theirs"]) == 0
    shown = capsys.readouterr().out
    assert shown == describe(entry_of(theirs)) + "\n" and f"{theirs.__module__}.Theirs" in shown
    assert "  --theirs.often   default None (ours); int or None in [1, inf)\n" in shown
    assert "  learning_rate = 0.5   (paper)\n" in shown
    assert main(["describe", "their"]) == 2
    assert "unknown strategy 'their'. Did you mean 'theirs'? Known: ada_filter, amcf, " in capsys.readouterr().err
