"""Labels come from training data; others in other splits are refused or dropped, and always named."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image

from hf_ft.data import load_splits
from hf_ft.data.columns import find_columns
from hf_ft.errors import DataError


@pytest.fixture
def photos(tmp_path):
    for split, names in (("train", ("cat", "dog")), ("val", ("cat", "dog", "eel")), ("test", ("ant", "cat", "dog"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{number}.png")
    return str(tmp_path)


def test_of_folders(photos):
    with pytest.raises(DataError, match=r"split 'validation' has classes that no training row has: 'eel' \(3 rows\)"):
        load_splits(photos)
    splits = load_splits(photos, unknown_classes="drop")
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 6, "test": 6}
    assert all(split.features["label"].names == ["cat", "dog"] for split in splits.values())
    for split in splits.values():
        rows = split.cast_column("image", datasets.Image(decode=False))
        assert all(["cat", "dog"][row["label"]] in row["image"]["path"] for row in rows)


def table(folder, **splits):
    for name, labels in splits.items():
        rows = [f"text {number},{label}" for number, label in enumerate(labels)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return str(folder)


def test_of_tables(tmp_path, caplog):
    source = table(tmp_path, train=["pos", "neg"] * 4, test=["POS", "neg", "POS", "pos"])
    with pytest.raises(
        DataError, match=r"split 'test'.*'POS' \(2 rows; did you mean 'pos'\?\).*unknown_classes to 'drop'"
    ):
        load_splits(source)
    splits = load_splits(source, unknown_classes="drop")
    assert splits["test"]["label"][:] == ["neg", "pos"] and find_columns(splits).names == ("neg", "pos")


def test_of_columns_given_as_they_are():
    """What the command refuses, the library refuses."""
    splits = DatasetDict(
        train=Dataset.from_dict({"text": ["a"] * 4, "label": [3, 5, 3, 5]}),
        test=Dataset.from_dict({"text": ["a"] * 2, "label": [7, 5]}),
    )
    with pytest.raises(
        DataError, match=r"split 'test' has classes that no training row has: 7 \(1 row\)|'7' \(1 row\)"
    ):
        find_columns(splits)


def test_a_test_column_of_minus_one_has_no_labels(tmp_path):
    """As in data from competitions."""
    splits = load_splits(table(tmp_path, train=[0, 1] * 4, test=[-1] * 3))
    assert find_columns(splits).names == ("0", "1")
    source = table(tmp_path, train=[-1, 1] * 4, test=[-1] * 3)  # here it is a class
    assert find_columns(load_splits(source)).names == ("-1", "1")


def test_names_that_a_data_set_declares_are_kept():
    feature = datasets.Features(text=datasets.Value("string"), label=ClassLabel(names=["a", "b", "unused"]))
    splits = DatasetDict(train=Dataset.from_dict({"text": ["x"] * 4, "label": [0, 1, 0, 1]}, features=feature))
    assert find_columns(splits).names == ("a", "b", "unused")


@pytest.mark.parametrize("labels", [["a"] * 6, [1] * 6])
def test_one_class_is_refused(labels, tmp_path):
    with pytest.raises(DataError, match="there is only one class in column 'label': .*label_column"):
        find_columns(load_splits(table(tmp_path, train=labels)))
