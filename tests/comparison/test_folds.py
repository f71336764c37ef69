"""Cross-validation for few labelled samples: each part is the validation split once."""

import dataclasses

import numpy as np
import pytest

from hf_ft import OptionError
from hf_ft.comparison import Data
from hf_ft.comparison.folds import FEW, class_of_rows, folds_of
from hf_ft.comparison.results import Training
from hf_ft.comparison.training import averaged
from hf_ft.data.columns import find_columns
from hf_ft.data.labels import class_labels
from tests.comparison.small_comparison import lasting, load, run, splits


def data(**counts):
    made = splits(**counts)
    return Data(made, find_columns(made))


def test_every_sample_validates_once_and_classes_are_even():
    given = data(train=(8, 8, 8), validation=(4, 4, 4))
    folds = folds_of(given, 4)
    assert sorted(np.concatenate(folds.parts)) == list(range(36))
    labels = class_of_rows(folds.pool, given.columns)
    for fold in range(4):
        train, validation = folds.rows(fold)
        assert sorted([*train, *validation]) == list(range(36))
        assert np.bincount(labels[validation]).tolist() == [3, 3, 3]
    assert [part.tolist() for part in folds_of(given, 4).parts] == [part.tolist() for part in folds.parts]


def test_a_class_with_one_sample_always_trains():
    given = data(train=(8, 8, 1), validation=(4, 4, 0))
    folds = folds_of(given, 5)
    labels = class_of_rows(folds.pool, given.columns)
    assert all(2 in labels[folds.rows(fold)[0]] for fold in range(5))


@pytest.mark.parametrize(("given", "count", "expected"), [(24, None, 5), (24, 3, 3), (24, 1, 1), (FEW, None, 1)])
def test_few_samples_use_folds_by_default(given, count, expected):
    found = folds_of(data(train=(given - 12, 0, 0), validation=(12, 0, 0)), count)
    assert (1 if found is None else len(found.parts)) == expected


def test_more_folds_than_samples():
    with pytest.raises(
        OptionError, match="folds=40 exceeds the 36 samples that can be used for validation: set folds=1"
    ):
        folds_of(data(), 40)
    with pytest.raises(OptionError, match="folds must be at least 1, got 0"):
        run("unused", folds=0)


def test_groups_stay_whole():
    """Samples of 20 patients, in both training and validation."""
    given = data(train=(20, 16, 12), validation=(4, 4, 4))
    who = np.random.default_rng(0).permutation(np.arange(60) % 20)
    parts, start = {}, 0
    for name in ("train", "validation"):
        split = given.splits[name]
        parts[name] = split.add_column("who", who[start : start + len(split)].tolist())
        start += len(split)
    given = dataclasses.replace(given, splits={**given.splits, **parts}, group_column="who")
    folds = folds_of(given, None)
    assert len(folds.parts) == 5 and sorted(np.concatenate(folds.parts)) == list(range(60))
    for fold in range(5):
        train, validation = folds.rows(fold)
        assert not {*who[train]} & {*who[validation]} and 5 <= len(validation) <= 19
        same = who[train][:, None] == who[train]
        groups = folds.groups(given, fold)
        assert np.array_equal(groups[:, None] == groups, same)  # what strategies hold out are whole groups again
    with pytest.raises(
        OptionError, match="folds=30 exceeds the 20 groups that can be used for validation: set folds=1"
    ):
        folds_of(given, 30)


def grouped(labels, groups):
    made = splits(train=np.bincount(labels, minlength=3).tolist(), validation=(0, 0, 0))
    made["train"] = made["train"].add_column("who", groups)
    made["validation"] = made["validation"].add_column("who", [])
    return Data(made, find_columns(made), group_column="who")


def test_one_group_alone_cannot_validate():
    assert folds_of(grouped([0, 0, 1], [0, 1, 1]), None) is None  # without group 1, class 1 could not be learned
    with pytest.raises(OptionError, match="folds=2 exceeds the 1 groups that can be used for validation"):
        folds_of(grouped([0, 0, 1], [0, 1, 1]), 2)


def test_columns_that_differ():
    given = data()
    given.splits["validation"] = given.splits["validation"].cast_column(
        "label", given.splits["validation"].features["label"].__class__(names=["blue", "green", "red"])
    )
    assert folds_of(given, None) is None
    with pytest.raises(OptionError, match="folds=3: train and validation have different columns"):
        folds_of(given, 3)


def test_trials_are_means_over_folds_and_runs_take_turns(tmp_path, monkeypatch):
    """Each training run sees only the rows of its fold, and strategies measure on those."""
    import hf_ft.comparison.runner as runner

    train, seen = runner.train, []

    def watched(entrant, values, seed, common, work, known=None, *more):
        sets = entrant.bench.data
        rows = [tuple(np.sort(sets[name].indices).tolist()) for name in ("train", "validation")]
        assert np.bincount(class_labels(sets["train"])).tolist() == [6, 6, 6]  # for class weights and searches
        seen.append((entrant.name, seed, rows, known is None or not known.states))
        training = train(entrant, values, seed, common, work, known, *more)
        seen[-1] = (*seen[-1], training.validation)
        return training

    monkeypatch.setattr(runner, "train", watched)
    results = run(tmp_path, "daft", trials=1, seeds=3, folds=2, num_train_epochs=1)
    given = folds_of(data(), 2)
    tried = [one for one in seen if one[0] == "daft" and one[1] == 0]
    final = [one for one in seen if one[0] == "daft" and one[1] > 0]
    for fold, one in enumerate(tried):
        assert one[2] == [tuple(rows) for rows in given.rows(fold)] and one[3]  # measured on each fold
    assert results["daft"].trials[0].validation == pytest.approx(np.mean([one[-1] for one in tried]))
    for seed, one in enumerate(final, start=1):
        assert one[2] == [tuple(rows) for rows in given.rows((seed - 1) % 2)] and not one[3]
    assert len(tried) == 2 and len(final) == 3
    assert results.data["sizes"] == {"train": 18, "validation": 18, "test": 18}
    assert "2 parts of the 36 labelled samples" in results.data["notes"][-1]
    assert results.settings["folds"] == 2


def test_interrupted_between_folds_it_ends_the_same(tmp_path):
    short = {"trials": 1, "seeds": 1, "folds": 2, "num_train_epochs": 1}
    whole = run(tmp_path / "whole", "full", **short)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", "full", **short, model=interrupting(5))  # in the second fold of the trial
    again = run(tmp_path / "two", "full", **short)
    assert lasting(again) == lasting(whole)


def interrupting(after):
    """A loader that is interrupted after making this many models."""
    made, loader = [], load()

    def interrupted(seed, keep):
        made.append(seed)
        if len(made) > after:
            raise KeyboardInterrupt
        return loader(seed, keep)

    return interrupted


def test_the_mean_of_trainings():
    one = Training(0, {}, 0.6, 2.0, curve=({"epoch": 1.0, "validation": 0.5}, {"epoch": 2.0, "validation": 0.6}))
    two = dataclasses.replace(
        one, validation=0.8, best_epoch=1.0, curve=({"epoch": 1.0, "validation": 0.8},), share=0.5
    )
    mean = averaged([one, two])
    assert (mean.validation, mean.best_epoch, mean.share) == pytest.approx((0.7, 1.5, 0.75))
    assert mean.curve == ({"epoch": 1.0, "validation": 0.65},)
    failed = averaged([one, dataclasses.replace(two, validation=None, error="diverged")])
    assert failed.validation is None and failed.error == "diverged"
    assert averaged([one]) is one
