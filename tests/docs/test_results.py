"""The tables of docs/results.md agree with the stored training runs."""

import dataclasses

import numpy as np
import pytest

from docs.tools import results as tables
from hf_ft.comparison.results import Results
from hf_ft.strategies.full import KEEP_STATISTICS
from tests.comparison.report.made_up_results import comparison


def table(headers, rows):
    return "\n".join("|".join(cells) for cells in (headers, *rows))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "KEPT", tmp_path)
    monkeypatch.setattr(tables, "RESAMPLES", 200)
    (tmp_path / "defaults").mkdir()
    splits = []
    for split in range(2):
        content = comparison()
        for contender in content["contenders"]:
            for run in contender["runs"]:
                run["scores"]["test"]["balanced_accuracy"] += 0.01 * split
        content["model"]["image_size"] = 96
        splits.append(Results.from_dict(content))
        splits[-1].save(tmp_path / "defaults" / f"cifar10_{split}.json")
    return splits


def test_scores_and_differences_over_all_splits(kept):
    head, *lines = tables.table_of_results(table, "defaults").split("\n\n")[0].splitlines()
    assert head == "strategy|CIFAR-10|vs. full"
    cells = {line.split("|")[0].strip("*"): line.split("|")[1:] for line in lines}
    runs = {name: [run for results in kept for run in results[name].finished_runs] for name in ("full", "daft")}
    scores = {name: [run.scores["test"]["balanced_accuracy"] for run in own] for name, own in runs.items()}
    for name, own in scores.items():
        assert cells[name][0].startswith(f"{np.mean(own):.3f}") and cells[name][0].endswith(
            f"{np.std(own, ddof=1):.3f}"
        )
    labels = np.asarray(kept[0].labels["test"])
    right = {name: [np.asarray(run.predictions["test"]) == labels for run in own] for name, own in runs.items()}
    recalls = {name: np.mean([[one[labels == c].mean() for c in (0, 1)] for one in own]) for name, own in right.items()}
    assert f"{abs(recalls['daft'] - recalls['full']):.3f} [" in cells["daft"][1] and cells["full"][1] == ""
    few = tables.table_of_results(table, "defaults", few=True)
    assert "**daft**" in few and "l2_sp" not in few and "2 splits with 3 seeds each" in few
    assert tables.table_of_results(table, "tuned") == tables.NOT_YET
    assert "split" not in head + "".join(lines)


def test_scores_of_some_splits_only_name_them(kept, tmp_path):
    without = dataclasses.replace(kept[1], contenders=tuple(c for c in kept[1].contenders if c.name != "tred"))
    without.save(tmp_path / "defaults" / "cifar10_1.json")
    rows = tables.table_of_results(table, "defaults").splitlines()
    assert "(split 1)" in next(row for row in rows if row.startswith("**tred**"))
    assert "(split" not in next(row for row in rows if row.startswith("full"))


def test_an_interval_covers_splits_seeds_and_images():
    """Each of the three alone gives it a width above zero."""
    labels = np.repeat([0, 1], 50)
    sure = np.ones((2, 100))
    assert tables.interval_over_splits([(sure, labels)] * 3) == (1.0, 1.0)
    seeds = sure * [[0.0], [1.0]]
    images = np.tile(np.arange(100) % 2, (2, 1)).astype(float)
    for gaps in ([sure, sure, 0 * sure], [seeds] * 3, [images] * 3):
        low, high = tables.interval_over_splits([(one, labels) for one in gaps])
        assert low < np.mean(gaps) - 0.05 and high > np.mean(gaps) + 0.05


def test_the_interval_of_a_mean_over_tasks():
    """Tasks vary independently, so the mean of two varies less than each; only strategies of all tasks have one."""
    labels = np.repeat([0, 1], 50)
    images = np.tile(np.arange(100) % 2, (2, 1)).astype(float)
    task, sure = [(images, labels)] * 3, [(np.ones((2, 100)), labels)] * 3
    low, high = tables.interval_over_splits(task)
    of_two, of_sure = tables.interval_over_splits(task, task), tables.interval_over_splits(task, sure)
    assert of_two[1] - of_two[0] < 0.9 * (high - low)
    assert of_sure == pytest.approx(((low + 1) / 2, (high + 1) / 2), abs=0.03)


def test_tasks_have_a_column_for_their_mean(kept, tmp_path):
    other = tuple(c for c in kept[0].contenders if c.name != "tred")
    dataclasses.replace(kept[0], contenders=other).save(tmp_path / "defaults" / "caltech40_0.json")
    head, *lines = tables.table_of_results(table, "defaults").split("\n\n")[0].splitlines()
    cells = {line.split("|")[0].strip("*"): line.split("|")[1:] for line in lines}
    assert head.split("|")[-1] == "mean vs. full" and cells["full"][-1] == cells["tred"][-1] == ""
    apart, both = (float(cells["daft"][place].split(" ")[0].replace("−", "-")) for place in (1, 4))
    assert cells["daft"][1].split(" ")[0] == cells["daft"][3].split(" ")[0] and both == apart


def test_the_gap_is_of_the_seeds_in_common(kept):
    full = next(c for c in kept[0].contenders if c.name == "full")
    others = [c for c in kept[0].contenders if c.name != "full"]
    one_seed = dataclasses.replace(kept[0], contenders=(dataclasses.replace(full, runs=full.runs[:1]), *others))
    gaps, labels = tables.gaps_of(one_seed, "daft")
    assert gaps.shape == (1, len(labels)) and set(np.unique(gaps)) <= {-1.0, 0.0, 1.0}


def test_auto_is_compared_with_the_winner_on_validation(kept, tmp_path):
    """The winner is chosen among tuned strategies by validation; auto and stock ran at their defaults."""
    (tmp_path / "tuned").mkdir()
    tuned = kept[0]
    tuned.save(tmp_path / "tuned" / "cifar10_0.json")
    renamed = {"daft": "auto", "l2_sp": "stock"}
    own = tuple(dataclasses.replace(c, name=renamed.get(c.name, c.name)) for c in tuned.contenders)
    for file in (tmp_path / "defaults").glob("*.json"):
        file.unlink()
    dataclasses.replace(tuned, contenders=own, winner="auto").save(tmp_path / "defaults" / "cifar10_0.json")
    head, task, mean = tables.table_of_auto(table).splitlines()
    validation = {c.name: np.mean([r.validation for r in c.finished_runs]) for c in tuned.contenders if c.finished_runs}
    winner = max(validation, key=validation.get)
    test = {
        name: np.mean([run.scores["test"]["balanced_accuracy"] for run in tuned[name].finished_runs])
        for name in ("daft", "l2_sp", winner)
    }
    cells = task.split("|")
    assert cells[:3] == ["CIFAR-10", f"{test['daft']:.3f}", f"{test[winner]:.3f} ({winner})"]
    assert cells[4] == f"{test['l2_sp']:.3f}" and len(cells) == len(head.split("|")) == len(mean.split("|"))


def test_confirmed_trials_are_counted_with_what_they_gained(kept, tmp_path):
    """One best trial was confirmed and one rejected; the rejected runs score four points less on test."""
    (tmp_path / "tuned").mkdir()

    def lower(run):
        test = {**run.scores["test"], "balanced_accuracy": run.scores["test"]["balanced_accuracy"] - 0.04}
        return dataclasses.replace(run, scores={**run.scores, "test": test})

    own = []
    for contender in kept[0].contenders:
        rejected = tuple(map(lower, contender.runs[:2])) if contender.name in ("daft", "tred") else ()
        chosen = {"full": 0, "tred": 0, "daft": 1}.get(contender.name)
        own.append(dataclasses.replace(contender, rejected=rejected, chosen=chosen))
    dataclasses.replace(kept[0], contenders=tuple(own)).save(tmp_path / "tuned" / "cifar10_0.json")
    _, row = tables.table_of_confirmed(table).splitlines()
    assert row == "CIFAR-10|1|1, +0.040|1, −0.040"
    head, *rows = tables.table_of_tuning(table).splitlines()
    assert head == "strategy|CIFAR-10|mean"
    assert rows == ["**daft**|+0.040|+0.040", "full|0.000|0.000", "**tred**|0.000|0.000"]


def test_on_how_many_tasks_kept_statistics_are_better():
    """What the advice on full fine-tuning says, by the stored results."""
    name = "full (statistics kept)"
    stored = tables.read("defaults", tables.TITLES).values()
    both = [splits for splits in stored if all(name in {one.name for one in s.contenders} for s in splits)]
    better = [tables._mean(splits, name) > tables._mean(splits, "full") for splits in both]
    assert (sum(better), len(better)) == (5, 6) and "five of six tasks" in KEEP_STATISTICS.because
