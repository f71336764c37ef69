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


@pytest.fixture(autouse=True)
def offline_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


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


def test_what_tools_made_is_no_class_and_told_if_it_contains_images(tmp_path, caplog, monkeypatch):
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
    assert f"{tmp_path}/cat/.ipynb_checkpoints was made by a tool and is no class: its 2 images" in caplog.text
    assert f"{tmp_path}/__MACOSX was made" in caplog.text and ".git" not in caplog.text


def test_classes_of_split_folders_are_those_of_all_splits(tmp_path):
    for split, name in (("train", "__a__"), ("train", "b"), ("val", "b"), ("test", "c")):
        write(tmp_path / split / name)
    splits = load_splits(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "validation": 4, "test": 4}
    assert splits["test"].features["label"].names == ["__a__", "b", "c"] and set(splits["test"]["label"][:]) == {2}


def test_images_in_deeper_folders_and_behind_links(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        write(tmp_path / "photos" / name)
    write(tmp_path / "elsewhere" / "black")
    (tmp_path / "photos" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "cat" / "back").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    splits = load_splits("photos")
    assert splits["train"].features["label"].names == ["black", "cat", "dog"]
    assert len(paths(splits)) == 12 and all(path.startswith(f"{tmp_path}/photos/") for path in paths(splits))


def test_same_rows_as_those_of_datasets(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog-a", "dog", "a/b"):
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
    with pytest.raises(DataError, match=r"of the first 30 files in it and its subfolders, [01] are images or tables"):
        load_splits(str(tmp_path))


def test_a_table_with_a_chain_of_urls_in_its_name(tmp_path):
    (tmp_path / "a::b.csv").write_text("text,label\n" + "x,0\ny,1\n" * 5)
    with pytest.raises(DataError, match=r"takes the '::' in '.*a::b\.csv' for a chain of URLs: rename"):
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
