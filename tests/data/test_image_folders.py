"""Folders of images: every folder in them is a class, whatever its name, except those that tools make."""

import logging

import datasets
import pytest
from PIL import Image

from hf_ft.data import files
from hf_ft.data.columns import find_columns
from hf_ft.data.images import check_images
from hf_ft.data.load import load_splits
from hf_ft.errors import DataError


def write(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("0.png", "1.png", "2.png", "3.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def classes(folder):
    splits = load_splits(str(folder))
    names = splits["train"].features["label"].names
    return {names[label] for split in splits.values() for label in split["label"][:]}, names


def paths(splits):
    return sorted(row["path"] for split in splits.values() for row in undecoded(split)["image"][:])


def undecoded(split):
    return split.cast_column("image", datasets.Image(decode=False))


def test_classes_of_any_name(tmp_path):
    names = ["--x", ".hidden", "__background__", "__one__", "a b", "train", "x::y", "ümlaut"]
    for name in names:
        write(tmp_path / name)
    assert classes(tmp_path) == (set(names), sorted(names))


def test_files_of_any_name_are_read(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / "a::b" / name, "x::y.png", "zip::z.png", ".w.png", "test_1.png", "[1].png", "*.png")
    splits = load_splits(str(tmp_path / "a::b"))
    assert sum(map(len, splits.values())) == 12
    _, unreadable = check_images(splits, find_columns(splits))
    assert not any(unreadable.values())


def test_folders_made_by_tools_are_no_classes_and_reported_if_they_contain_images(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_ft"), "propagate", True)
    for name in ("cat", "dog"):
        write(tmp_path / name)
    write(tmp_path / "cat" / ".ipynb_checkpoints", "0-checkpoint.png", "1-checkpoint.png")
    write(tmp_path / "__MACOSX" / "cat", "0.png")
    (tmp_path / "__MACOSX" / "cat" / "._0.png").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    (tmp_path / "cat" / "._0.png").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert classes(tmp_path)[1] == ["cat", "dog"]
    assert f"2 images in {tmp_path}/cat/.ipynb_checkpoints, which a tool made" in caplog.text
    assert f"1 images in {tmp_path}/__MACOSX, which" in caplog.text and ".git" not in caplog.text
    assert "other files" not in caplog.text  # .DS_Store, and attributes of macOS


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("Training", None, "Testing"),
        ("Train", "Valid", "Test"),
        ("TRAIN", None, "TEST"),
        ("train_set", "val_set", "test_set"),
        ("training-images", "validation-images", "test-images"),
        ("train2017", "val2017", None),
        ("Training Data", "dev", "Test Data"),
    ],
)
def test_split_folders_of_any_spelling(train, validation, test, tmp_path):
    for split in filter(None, (train, validation, test)):
        for name in ("cat", "dog"):
            write(tmp_path / split / name, *(f"{split}-{number}.png" for number in range(5)))
    splits = load_splits(str(tmp_path))
    assert splits["train"].features["label"].names == ["cat", "dog"]
    for role, name in (("train", train), ("validation", validation or train), ("test", test)):
        assert (role in splits) == bool(name)
        assert not name or all(f"/{name}/" in path for path in paths({role: splits[role]}))


@pytest.mark.parametrize("names", [("one", "two"), ("cat", "test"), ("photos", "Testing"), ("site0", "site1", "site2")])
def test_folders_that_may_be_splits_are_refused(names, tmp_path):
    for split in names:
        for name in ("a", "b"):
            write(tmp_path / split / name)
    with pytest.raises(DataError, match=r"contain folders of images.*set train_split to '\.'"):
        load_splits(str(tmp_path))
    one = load_splits(str(tmp_path), train_split=names[0], test_split=names[1])
    assert len(paths({"": one["test"]})) == 8 and one["train"].features["label"].names == ["a", "b"]
    whole = load_splits(str(tmp_path), train_split=".")
    assert whole["train"].features["label"].names == sorted(names)


def test_splits_without_classes_are_refused(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split)
    with pytest.raises(DataError, match="test, train are splits by name, but contain images outside class folders"):
        load_splits(str(tmp_path))
    assert classes_of_whole(tmp_path) == ["test", "train"]


def classes_of_whole(folder):
    return load_splits(str(folder), train_split=".")["train"].features["label"].names


def test_a_training_split_that_is_not_there_is_refused(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / name)
    with pytest.raises(DataError, match="no split 'trian', only.*train"):
        load_splits(str(tmp_path), train_split="trian")


def test_two_training_splits_are_refused(tmp_path):
    for split in ("Training", "TRAINING_data"):
        for name in ("cat", "dog"):
            write(tmp_path / split / name)
    with pytest.raises(DataError, match="could each be the train split: set train_split"):
        load_splits(str(tmp_path))


def test_what_is_left_out_is_reported(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_ft"), "propagate", True)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            write(tmp_path / split / name)
    write(tmp_path / "train", "loose.png")
    write(tmp_path / "extra", "0.png", "1.png")
    for file in ("train/cat/0.heic", "train/dog/1.heic", "train/README.txt", "test/Thumbs.db"):
        (tmp_path / file).write_bytes(b"x")
    load_splits(str(tmp_path))
    (told,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert (
        "2 .heic files" in told
        and "1 .txt files" in told
        and f"1 images in {tmp_path}/train, outside class folders" in told
    )
    assert f"2 images in {tmp_path}/extra, which is not a split with class folders" in told and ".db" not in told


@pytest.mark.parametrize("suffix", [".ppm", ".jfif", ".JPG", ".tga"])
def test_images_of_other_suffixes_are_read(suffix, tmp_path):
    for name in ("cat", "train", "test_1"):
        write(tmp_path / name, *(f"{number}{suffix}" for number in range(3)))
    assert classes(tmp_path) == ({"cat", "train", "test_1"}, ["cat", "test_1", "train"])


def test_images_in_deeper_folders_and_behind_links(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        write(tmp_path / "photos" / name)
    write(tmp_path / "elsewhere" / "black")
    (tmp_path / "photos" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "cat" / "back").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    splits = load_splits("photos")
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert len(paths(splits)) == 12 and all(path.startswith(f"{tmp_path}/photos/") for path in paths(splits))


def test_same_rows_as_those_of_datasets(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog-a", "dog", "a"):
            write(tmp_path / split / name, "x1.png", "x10.png", "x2.PNG", "x.bmp")
    patterns = {name: f"{name}/**" for name in ("test", "train")}
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), data_files=patterns, drop_labels=False)
    ours = files.read_files(str(tmp_path))
    assert ours["train"].features == theirs["train"].features
    for name in patterns:
        assert undecoded(ours[name])[:] == undecoded(theirs[name])[:]


def test_a_folder_that_is_no_data_set_is_refused_at_once(tmp_path, monkeypatch):
    write(tmp_path / "Pictures", "holiday.png")
    (tmp_path / "code").mkdir()
    for number in range(40):
        (tmp_path / "code" / f"{number}.py").write_text("")
    monkeypatch.setattr(files, "SCANNED", 30)
    monkeypatch.setattr(files, "FEW", 20)
    monkeypatch.setattr(files, "load_dataset", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(
        DataError, match=r"of the first 30 files in it and its subfolders, only [01] are images, sounds or tables"
    ):
        load_splits(str(tmp_path))


def test_a_table_with_a_chain_of_urls_in_its_name(tmp_path):
    (tmp_path / "a::b.csv").write_text("text,label\n" + "x,0\ny,1\n" * 5)
    with pytest.raises(DataError, match=r"interprets the '::' in '.*a::b\.csv' as a chain of URLs: rename"):
        load_splits(str(tmp_path / "a::b.csv"))
    write(tmp_path / "images", *(f"x::{number}.png" for number in range(6)))
    rows = [f"images/x::{number}.png,{number % 2}" for number in range(6)]
    (tmp_path / "table.csv").write_text("\n".join(["file_name,label", *rows]) + "\n")
    splits = load_splits(str(tmp_path / "table.csv"), validation_fraction=0.34)
    assert not any(check_images(splits, find_columns(splits))[1].values())


def test_a_configuration_where_there_is_none(tmp_path):
    write(tmp_path / "photos" / "cat"), write(tmp_path / "photos" / "dog")
    (tmp_path / "a.csv").write_text("text,label\n" + "x,0\ny,1\n" * 5)
    for source in ("uci_digits", "photos", "a.csv"):
        source = source if source == "uci_digits" else str(tmp_path / source)
        with pytest.raises(DataError, match="config_name='plain' has no effect"):
            load_splits(source, config_name="plain")
