"""The tables of docs/results.md agree with the stored training runs."""

import numpy as np
import pytest

from docs.tools import results as docs_results
from hf_ft.comparison.results import Results
from tests.comparison.report.made_up_results import comparison


def table(headers, rows):
    return "\n".join("|".join(cells) for cells in (headers, *rows))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    results = Results.from_dict(comparison())
    results.settings.update(num_train_epochs=8, per_device_train_batch_size=32)
    results.versions.update(torch="2", transformers="5")
    results.save(tmp_path / "digits.json")
    monkeypatch.setattr(docs_results, "KEPT", tmp_path)
    monkeypatch.setattr(docs_results.read, "__defaults__", (tmp_path, docs_results.TASKS))
    return results


def scores_of(results, name):
    return {run.seed: run.scores["test"]["balanced_accuracy"] for run in results[name].runs if not run.error}


def test_every_strategy_with_its_difference(kept):
    lines = docs_results.table_of_all(table).splitlines()
    cells = {line.split("|")[0].strip("*"): line.split("|") for line in lines[1:]}
    full = scores_of(kept, "full")
    for name in ("full", "daft", "linear_probe"):
        scores = scores_of(kept, name)
        assert cells[name][1].startswith(f"{np.mean(list(scores.values())):.3f}")
        if name != "full":
            difference = np.mean([scores[seed] - full[seed] for seed in scores])
            assert f"{abs(difference):.3f}" in cells[name][2]
    assert cells["daft"][0] == "**daft**" and cells["full"][0] == "full"


def test_a_task_names_what_was_chosen(kept):
    text = docs_results.table_of_task(table, "digits")
    chosen = kept["l2_sp"].trials[kept["l2_sp"].chosen].params["learning_rate"]
    line = next(line for line in text.splitlines() if line.startswith("l2_sp"))
    assert f"lr {chosen:.2g}" in line and f"|{len(kept['l2_sp'].trials)}|" in line
    assert docs_results.table_of_task(table, "elpv_100") == docs_results.NOT_YET


def test_the_five_systems_against_full_fine_tuning(kept):
    header, *rows = docs_results.table_of_five(table).splitlines()
    assert header == "system|digits" and [row.split("|")[0] for row in rows] == list(docs_results.FIVE)
    scores, full = scores_of(kept, "daft"), scores_of(kept, "full")
    differences = [scores[seed] - full[seed] for seed in scores]
    same_sign = min(differences) > 0 or max(differences) < 0
    assert rows[1].split("|")[1].endswith("on all" if same_sign else "mixed")


def test_what_validation_selected_against_the_best_on_test(kept):
    row = docs_results.table_of_choice(table).splitlines()[1].split("|")
    means = {c.name: np.mean(list(scores_of(kept, c.name).values())) for c in kept.contenders if c.status == "finished"}
    assert row[2].startswith(f"{kept.winner}: {means[kept.winner]:.3f}")
    assert row[3].startswith(f"{max(means, key=means.get)}: ")


def test_nothing_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_results.read, "__defaults__", (tmp_path, docs_results.TASKS))
    for made in (docs_results.table_of_all, docs_results.table_of_five, docs_results.table_of_choice):
        assert made(table) == docs_results.NOT_YET
