"""Folders of tables: each file is read on its own, and belongs to the split in its name."""

import datasets
import pytest
from PIL import Image

from hf_ft.data import load_splits
from hf_ft.data.columns import find_columns
from hf_ft.data.files import read_files
from hf_ft.data.images import check_images
from hf_ft.errors import DataError


def write(file, text="film", header="text,label", separator=",", labels=("a", "b"), encoding="utf-8"):
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [header, *(f"{text} {number},{labels[number % len(labels)]}" for number in range(10))]
    file.write_bytes("\n".join(rows).replace(",", separator).encode(encoding))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.csv", "test.csv"),
        ("Train.CSV", "TESTING.csv"),
        ("imdb_train.csv", "imdb-test.csv"),
        ("train/data.csv", "test/data.csv"),
        ("tables/train_set.csv", "tables/eval.csv"),
        ("train-00000-of-00001.csv", "test-00000-of-00001.csv"),
        ("train[1].csv", "test*.csv"),
        ("training/test_like.csv", "test/train_like.csv"),
    ],
)
def test_splits_by_name(train, test, tmp_path):
    write(tmp_path / train, "old")
    write(tmp_path / test, "new", separator=";")
    read = read_files(str(tmp_path))
    assert {name: part["text"][0] for name, part in read.items()} == {"test": "new 0", "train": "old 0"}


def test_tables_without_names_of_splits_are_one(tmp_path):
    write(tmp_path / "part1.csv", separator=";")
    write(tmp_path / "part2.csv", header="label,text", labels=("c",))
    write(tmp_path / ".hidden.csv", labels=("d",))
    read = read_files(str(tmp_path), train_split="all")
    assert list(read) == ["all"] and len(read["all"]) == 20
    assert read["all"]["text"][10] == "c" and read["all"].column_names == ["text", "label"]


def test_each_table_is_checked(tmp_path):
    write(tmp_path / "train.csv")
    write(tmp_path / "validation.csv", "schön", encoding="latin-1")
    with pytest.raises(DataError, match=r"validation\.csv' is not utf-8: line 2"):
        load_splits(str(tmp_path))
    write(tmp_path / "validation.csv", "a, b")
    with pytest.raises(DataError, match=r"validation\.csv': line 2 has 3 fields"):
        load_splits(str(tmp_path))


def test_other_splits_get_the_columns_and_types_of_training(tmp_path):
    write(tmp_path / "train.csv", labels=(0, 1))
    write(tmp_path / "test.csv", "1,film", "id,text,label", labels=("0.0", "1.0"))
    splits = load_splits(str(tmp_path))
    assert splits["test"].features == splits["train"].features
    assert splits["test"]["label"][:2] == [0, 1] and find_columns(splits).names == ("0", "1")


def test_class_numbers_of_other_names_are_not_converted(tmp_path):
    for name, names in (("train", ["a", "b"]), ("test", ["b", "a"])):
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
        table = datasets.Dataset.from_dict({"text": ["film"] * 8, "label": [0, 1] * 4}, features=features)
        table.to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"disagree on the type.*names=\['a', 'b'\].*names=\['b', 'a'\]"):
        find_columns(load_splits(str(tmp_path)))


def test_a_data_card_that_lists_files_is_followed(tmp_path):
    write(tmp_path / "one.csv", "old")
    write(tmp_path / "two.csv", "new")
    paths = [f"  - split: {split}\n    path: {path}.csv" for split, path in (("train", "two"), ("test", "one"))]
    lines = ["---", "configs:", "- config_name: default", "  data_files:", *paths, "---", "# Films"]
    (tmp_path / "README.md").write_text("\n".join(lines) + "\n")
    read = read_files(str(tmp_path))
    assert {name: part["text"][0] for name, part in read.items()} == {"train": "new 0", "test": "old 0"}


def test_trailing_separators_are_no_fields(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "film,a,\nfilm,b,\n" * 5)
    splits = load_splits(str(tmp_path / "a.csv"))
    assert set(splits["train"]["text"][:]) == {"film"} and find_columns(splits).names == ("a", "b")


def test_the_fault_in_a_file_is_reported(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "film", "label": 1}\n' * 3 + '{"text": "film", "la\n')
    with pytest.raises(DataError, match="JSON parse error"):
        load_splits(str(tmp_path / "a.jsonl"))


def test_paths_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for number in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    rows = [f"~/{number}.png,{number % 2}" for number in range(10)]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.csv").write_text("\n".join(["image,label", *rows]))
    splits = load_splits(str(tmp_path / "tables" / "a.csv"))
    assert not any(check_images(splits, find_columns(splits))[1].values())
