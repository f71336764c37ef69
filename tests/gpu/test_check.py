"""The check for a GPU also runs on a CPU, and reports a broken law."""

import json

import pytest

from docs.tools import measured, tables
from hf_ft import L2SPConfig
from hf_ft.core.plan import Plan, Term
from tests.gpu import check


def run(folder, *given):
    status = check.main(["--tiny", "--json", str(folder / "found.json"), *given])
    return status, json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_laws_and_figures(tmp_path, capsys):
    laws = "everything_is_on_the_device", "best_model_is_loaded"
    status, found = run(tmp_path, "--strategies", "linear_probe", "--laws", ",".join(laws), "--rounds", "1")
    assert status == 0 and found["errors"] == []
    assert {(e["law"], e["precision"], e["kept"]) for e in found["laws"]} == {
        ("everything_is_on_the_device", "fp32", 1),
        ("best_model_is_loaded", "fp32", 1),
        ("best_model_is_loaded", "bf16", 1),
    }
    assert {"linear_probe: live", "linear_probe: recorded features"} < set(found["rows"])
    assert all(row["full"]["ratio"] > 0 for row in found["rows"].values())
    told = capsys.readouterr().out
    assert "| everything_is_on_the_device | fp32 | 1 |" in told and "| linear_probe: live |" in told


def not_zero_at_the_start(self, model, state):
    return Plan(terms=(Term("l2_sp", lambda view: sum(w.square().sum() for w in view.weights(("",))), anchors=("",)),))


def test_a_broken_law_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(L2SPConfig, "plan", not_zero_at_the_start)
    given = "--strategies", "full,l2_sp", "--laws", "anchored_terms_start_at_zero", "--rounds", "0"
    status, found = run(tmp_path, *given)
    assert status == 1
    ((error),) = found["errors"]
    assert (error["strategy"], error["law"]) == ("l2_sp", "anchored_terms_start_at_zero")
    assert [(e["kept"], e["broken"]) for e in found["laws"]] == [(1, ["l2_sp"])]
    told = capsys.readouterr().out
    assert "l2_sp breaks anchored_terms_start_at_zero on tiny_" in told and "at the start" in told


def test_what_does_not_fit_into_the_time_counts_as_not_run(tmp_path):
    given = "--strategies", "full", "--laws", "plan_is_pure", "--rounds", "0", "--minutes", "0"
    status, found = run(tmp_path, *given)
    assert status == 0 and [(e["kept"], e["not_run"]) for e in found["laws"]] == [(0, 1)]


def test_names_that_do_not_exist_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--strategies", "ful", "--laws", "plan_is_pure")
    assert "unknown: ful" in capsys.readouterr().err


def test_reasons_are_for_existing_rows():
    assert set(check.WAITS) <= {row.name for row in check.step_times.ROWS}


def test_the_table_shows_what_was_measured(tmp_path, monkeypatch):
    ratio = {"ratio": 1.2345, "low": 1.2, "high": 1.3}
    memory = {"mb": 200.4, "full": 1.5, "floor": 1.25}
    about = {"device": "Card", "torch": "2.9", "transformers": "5.0", "cuda": "12.8", "driver": "570.1"}
    content = {
        "about": {**about, "geometry": "small", "rounds": 7},
        "laws": [{"precision": "fp16", "law": "one", "kept": 2, "broken": ["full"], "not_run": 3}],
        "rows": {"soft": {"full": ratio, "floor": ratio, "memory": memory, "waits": "a.py:1 (f)"}, "late": None},
    }
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    assert "no figures" in measured.table_of_gpu(tables._table)
    (tmp_path / "gpu.json").write_text(json.dumps(content), encoding="utf-8")
    told = measured.table_of_gpu(tables._table).splitlines()
    assert "| one | fp16 | 2 | full | 3 |" in told
    times = "1.234 (1.200 to 1.300) | 1.23 (1.20 to 1.30)"
    assert f"| soft | {times} | 200 MB | 1.50 | 1.25 | a.py:1 (f) |" in told
    assert "Time ran out before: late." in told
    assert "Card, torch 2.9, transformers 5.0, CUDA 12.8, driver 570.1; small; 7 rounds." in told
