"""What strategies hold out for their own choices are whole groups, such as all samples of a patient."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from hf_ft import BlockwiseConfig, FTTrainer, OptionError
from hf_ft.advice import advise
from hf_ft.advice.transferability import cross_validated_probe, cross_validated_relationship
from hf_ft.data.groups import given_groups
from hf_ft.engine import probe
from hf_ft.search.evaluate import ShortTrainings
from hf_ft.search.folds import context_on, folds_of
from hf_ft.testing import tiny_data, tiny_resnet
from hf_ft.testing.training import make_trainer, tiny_arguments

PATIENTS = [f"patient {row * 7 % 8}" for row in range(31)] + [None]  # no group has all samples of a class


def context(tmp_path, groups=PATIENTS):
    return make_trainer(tiny_resnet(), "full", tmp_path, groups=groups).context()


def shared(first, second):
    return {PATIENTS[row] for row in first} & {PATIENTS[row] for row in second}


def test_searches_hold_out_whole_groups(tmp_path):
    given = context(tmp_path)
    assert given.samples.count == len(PATIENTS)
    trainings = ShortTrainings(tiny_resnet(), given, "accuracy", 0.25, 1)
    train, held_out = trainings.rows(0)
    assert sorted(train + held_out) == list(range(32)) and not shared(train, held_out) and 4 <= len(held_out) <= 12
    rows = ShortTrainings(tiny_resnet(), context(tmp_path, None), "accuracy", 0.25, 1)
    assert shared(*rows.rows(0))
    draws = [trainings.rows(seed) for seed in range(8)]
    assert not any(shared(*draw) for draw in draws) and len({tuple(held_out) for _, held_out in draws}) > 1
    assert trainings.describe({}) != rows.describe({})  # trials of one are not trials of the other


def test_folds_consist_of_whole_groups(tmp_path):
    given = context(tmp_path)
    folds = folds_of(given.samples.count, given.labels, 4, given.groups)
    assert sorted(row for fold in folds for row in fold.held_out) == list(range(32))
    for fold in folds:
        assert not shared(fold.train, fold.held_out) and sorted(fold.train + fold.held_out) == list(range(32))
    part = context_on(given, folds[0].train)
    inner = ShortTrainings(tiny_resnet(), part, "accuracy", 0.25, 1)
    back = [[folds[0].train[row] for row in rows] for rows in inner.rows(0)]
    assert not shared(*back)
    with pytest.raises(OptionError, match="9 groups of training samples.* too few for 10 folds: set fewer"):
        folds_of(given.samples.count, given.labels, 10, given.groups)


def known_patients():
    """Features that identify the patient exactly but hardly predict the class, labels, and patients."""
    draw = np.random.default_rng(0)
    patients = np.repeat(np.arange(20), 10)
    labels = np.repeat(np.arange(20) % 2, 10)
    features = np.eye(20)[patients] * 10 + draw.normal(size=(200, 20))
    features[:, 0] += 0.2 * labels
    return features, labels, patients


@pytest.mark.parametrize("score", [cross_validated_probe, cross_validated_relationship])
def test_advice_scores_features_on_unseen_groups(score):
    features, labels, patients = known_patients()
    features = np.exp(features) / np.exp(features).sum(axis=1, keepdims=True)
    assert score(features, labels).balanced_accuracy > 0.9
    found = score(features, labels, groups=patients)
    assert found.balanced_accuracy < 0.65 and found.folds == 5
    # Eight patients, four of each class: at most four folds (older scikit-learn may make fewer usable ones).
    some = patients < 8
    assert 2 <= score(features[some], labels[some], groups=patients[some]).folds <= 4
    # A class with one patient is left out; then nothing is left to score.
    assert score(features[some], labels[some], groups=labels[some]) is None


def test_advise_takes_groups():
    model = tiny_resnet()
    data, collate = tiny_data(model, 32), default_data_collator
    labels = [row["labels"] for row in data]
    assert advise(model, data, collate).signals.probe_folds == 5
    assert advise(model, data, collate, groups=labels).signals.probe_balanced_accuracy is None
    with pytest.raises(OptionError, match="groups has 3 values for 32 training samples"):
        advise(model, data, collate, groups=[1, 2, 3])


def test_the_probe_does_not_choose_its_penalty_on_groups_that_it_has_seen():
    """On unseen patients, only a strong penalty does no harm."""
    features, labels, patients = known_patients()
    given = torch.from_numpy(features), torch.from_numpy(labels), 2
    assert probe.logistic_probe(*given).accuracy > 0.9
    assert probe.logistic_probe(*given, groups=patients).accuracy < 0.7


def test_a_block_search_of_the_trainer(tmp_path):
    config = BlockwiseConfig(scheme="stage", search_epochs=1, storage="memory")
    trainer = make_trainer(tiny_resnet(), config, tmp_path, groups=np.array(PATIENTS, dtype=object), max_steps=2)
    trainer.train()
    assert trainer.states["blockwise"].info["scores"]["scores"]
    with pytest.raises(OptionError, match="all 32 training samples belong to one group"):
        make_trainer(tiny_resnet(), config, tmp_path / "one", groups=[1] * 32, max_steps=2).train()


@pytest.mark.parametrize(
    "groups",
    [
        pd.Series(["a", None, "a", float("nan"), np.nan, np.nan], dtype=object),
        pd.Series(["a", None, "a", None, None, None], dtype="string"),
        pd.Series([1, None, 1, None, None, None], dtype="Int64"),
        pd.Series(pd.to_datetime(["2020", None, "2020", None, None, None])),
        np.array([1, np.nan, 1, np.nan, np.nan, np.nan]),
        [1.0, np.nan, 1.0, np.nan, np.nan, np.nan],
    ],
)
def test_a_sample_without_a_value_is_a_group_of_its_own(groups):
    assert given_groups(groups, range(6)).tolist() == [0, 1, 0, 2, 3, 4]


def test_groups_of_a_formatted_dataset():
    """Its values are tensors, which never count as equal keys."""
    data = Dataset.from_dict({"patient": [7, 7, 8, 7]}).with_format("torch")
    for groups in (data["patient"], list(data["patient"]), data["patient"][:], np.array([7, 7, 8, 7])):
        assert given_groups(groups, data).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (3, "groups must be values that can be compared, such as numbers or names: .*int"),
        ([1, 2, 3], "groups has 3 values for 32 training samples: give one for each"),
        ([[1]] * 32, "groups must be values that can be compared, such as numbers or names: .*list"),
    ],
)
def test_groups_that_do_not_fit(tmp_path, groups, message):
    with pytest.raises(OptionError, match=message):
        make_trainer(tiny_resnet(), "full", tmp_path / "out", groups=groups)
    assert not (tmp_path / "out").exists()


def test_a_stream_has_no_groups(tmp_path):
    stream = Dataset.from_list([{"labels": 0}]).to_iterable_dataset()
    with pytest.raises(OptionError, match="groups need a train_dataset with rows by index"):
        FTTrainer(
            tiny_resnet(), tiny_arguments(tmp_path, max_steps=1), strategy="full", train_dataset=stream, groups=[1]
        )
