"""Exact sizes, shares of the classes, and no class lost from training, whatever the imbalance."""

import datasets
import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from hf_ft.data import load
from hf_ft.data.columns import ROW
from hf_ft.data.load import load_splits
from hf_ft.splits import absent_classes, stratified_rows

IMBALANCES = [
    (1000, 1),
    (1000, 2),
    (50, 3, 1, 1),
    (7, 1),
    (2, 2),
    (60, 40),
    (1, 1, 1, 1, 1),
    (3,) * 40,
    (300, 100, 30, 10, 3, 1),
]


def classes(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def count(labels, classes):
    return np.bincount(labels, minlength=classes)


@pytest.mark.parametrize("counts", IMBALANCES, ids=str)
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_sizes_are_exact_and_no_class_is_lost_from_training(counts, fraction, seed):
    labels = classes(counts)
    validation = max(1, round(len(labels) * fraction))
    sizes = {"train": len(labels) - validation, "validation": validation}
    parts = stratified_rows(labels, sizes, seed)
    assert {name: len(rows) for name, rows in parts.items()} == sizes
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    found = count(labels[parts["train"]], len(counts))
    if sizes["train"] >= len(counts):
        assert found.min() >= 1  # so every class with a single row is there
    shares = np.array(counts) * sizes["train"] / len(labels)
    lifted = int((shares < 1).sum())  # classes that got more than their share, at the expense of others
    assert (np.abs(found - shares) < 1 + lifted).all()
    again = stratified_rows(labels, sizes, seed)
    assert all(np.array_equal(parts[name], again[name]) for name in sizes)
    text = stratified_rows(np.array([f"class {label}" for label in labels]), sizes, seed)
    assert len(counts) > 10 or all(np.array_equal(parts[name], text[name]) for name in sizes)  # the same order


@pytest.mark.parametrize("counts", IMBALANCES, ids=str)
def test_a_small_draw_has_every_class_that_fits(counts):
    labels = classes(counts)
    for size in range(1, min(len(labels), 60)):
        rows = stratified_rows(labels, {"train": size}, seed=size)["train"]
        assert len(set(rows)) == size
        assert len(set(labels[rows])) == len(counts) or size < len(counts)


def test_several_splits_share_what_is_left():
    labels = classes((100, 40, 4, 1))
    parts = stratified_rows(labels, {"train": 80, "validation": 30, "test": 20}, seed=3)
    found = {name: count(labels[rows], 4) for name, rows in parts.items()}
    assert {name: int(rows.sum()) for name, rows in found.items()} == {"train": 80, "validation": 30, "test": 20}
    assert len(set(np.concatenate(list(parts.values())))) == 130
    assert found["train"][3] == 1 and found["train"][2] >= 2
    for name, rows in found.items():
        assert abs(rows[0] / rows.sum() - 100 / 145) < 0.05, name


@pytest.mark.parametrize("counts", [(60, 40), (30, 20, 10, 10)], ids=str)
def test_if_all_classes_can_be_split_the_draw_is_scikit_learns(counts):
    labels = classes(counts)
    size = len(labels) * 4 // 5
    parts = stratified_rows(labels, {"train": size, "validation": 7}, seed=5)
    train, left = train_test_split(np.arange(len(labels)), train_size=size, random_state=5, stratify=labels)
    assert np.array_equal(parts["train"], train)
    wanted = train_test_split(left, train_size=7, random_state=5, stratify=labels[left])[0]
    assert np.array_equal(parts["validation"], wanted)


def test_rounding_and_rows_are_random():
    labels, seeds = np.repeat(np.arange(10), 3), 300
    drawn = np.zeros(30)
    for seed in range(seeds):
        drawn[stratified_rows(labels, {"train": 25, "validation": 5}, seed)["validation"]] += 1
    # Each of 5 out of 30 rows: a binomial of standard deviation 6.5 around 50.
    assert drawn.sum() == 5 * seeds and (np.abs(drawn - 50) < 26).all()
    assert (np.abs(drawn.reshape(10, 3).sum(axis=1) - 150) < 35).all()


def test_a_split_without_a_class_is_reported_once_by_name(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(load.logger, "propagate", True)
    rows = [f"text {row},{label}" for label, count in (("a", 50), ("b", 9), ("c", 1), ("d", 1)) for row in range(count)]
    (tmp_path / "rare.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    splits = load_splits(str(tmp_path / "rare.csv"), test_fraction=0.2, labelled=30)
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "validation": 6, "test": 12}
    assert set(splits["train"]["label"][:]) == {"a", "b", "c", "d"}
    assert len(set(sum((split[ROW][:] for split in splits.values()), []))) == 42
    [record] = [record for record in caplog.records if "too few rows" in record.message]
    assert "validation has none of 'c' (1 row), 'd' (1 row); test has none of 'c' (1 row), 'd'" in record.message
    caplog.clear()
    load_splits(str(tmp_path / "rare.csv"), labelled=3, validation_fraction=0.4)
    assert "train has none of " in caplog.text


def test_many_absent_classes_are_counted():
    labels = np.repeat(np.arange(20), 2)
    names = [f"n{number}" for number in range(20)]
    told = absent_classes(labels, {"train": labels, "validation": labels[:20], "test": np.array([])}, names)
    assert "validation has none of 'n10' (2 rows), 'n11'" in told and "and 5 more classes" in told
    assert "train has" not in told and "test has" not in told
    assert absent_classes(labels, {"train": labels}) is None
