"""Every row of the table in docs/data.md: its input is created, read, and compared with what the row says."""

import gzip
import json
import logging
import re
import unicodedata
from pathlib import Path

import datasets
import pytest
from PIL import Image

from hf_ft.data import load_splits
from hf_ft.data.columns import find_columns
from hf_ft.data.images import check_images
from hf_ft.errors import DataError

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
ROWS = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in PAGE.read_text().splitlines()]
ROWS = [row for row in ROWS if row][2:]
NAMES = ("cat", "dog")


@pytest.fixture(autouse=True)
def offline_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(logging.getLogger("hf_ft"), "propagate", True)


def image(file, mode="RGB", **more):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8)).save(file, **more)


def folders(folder, names=NAMES, each=5):
    for name in names:
        for number in range(each):
            image(folder / name / f"{number}.png")
    return folder


def splits_of(folder, *names, classes=NAMES):
    for name in names:
        folders(folder / name, classes)
    return folder


def labels(names=NAMES):
    return [names[number % len(names)] for number in range(10)]


def csv(file, names=NAMES, inputs=None, header="text,label", encoding="utf-8"):
    """A table of ten rows; without names, without labels."""
    inputs = inputs or [f"film {number}" for number in range(10)]
    rows = [f"{text},{label}" for text, label in zip(inputs, labels(names), strict=True)] if names else inputs
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes("\n".join([header, *rows, ""]).encode(encoding))
    return file


def written(file, text, encoding="utf-8"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode(encoding))
    return file


def images_and_table(folder, images, *tables, header="image,label", beside=False):
    for name in images:
        for number in range(10):
            image(folder / name / f"{number}.png")
    for name, table in zip(images, tables, strict=True):
        csv(folder / table, inputs=[f"{name and name + '/'}{number}.png" for number in range(10)], header=header)
    return folder


def with_file(folder, file, make=lambda file: written(file, "x")):
    make(folders(folder) / file)
    return folder


def pngs_called_jpg(folder):
    for file in list(folders(folder).rglob("*.png")):
        file.rename(file.with_suffix(".jpg"))
    return folder


def of_all_modes(folder):
    folders(folder, each=3)
    image(folder / "cat" / "a.jpg", "CMYK")
    image(folder / "cat" / "b.png", "RGBA")
    image(folder / "dog" / "a.png", "I;16")
    frames = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in (0, 200)]
    frames[0].save(folder / "dog" / "b.gif", save_all=True, append_images=frames[1:])
    return folder


def linked(folder):
    folders(folder / "store")
    (folder / "data").mkdir()
    for name in NAMES:
        (folder / "data" / name).symlink_to(folder / "store" / name)
    return folder / "data"


def accents(folder):
    for split, form in (("train", "NFC"), ("test", "NFD")):
        folders(folder / split, (unicodedata.normalize(form, "café"), "dog"))
    return folder


def tables(folder, **made):
    for name, names in made.items():
        csv(folder / f"{name}.csv", names)
    return folder


def contest(folder):
    tables(folder, train=NAMES)
    csv(folder / "test.csv", (), [f"{number},film" for number in range(10)], "id,text")
    csv(folder / "sample_submission.csv", header="id,label")
    return folder


def without_labels(folder):
    tables(folder, train=NAMES)
    csv(folder / "validation.csv", (), header="text")
    return folder


def records(names=NAMES):
    return [{"text": "film", "label": label} for label in labels(names)]


def jsonl(file, names=NAMES):
    return written(file, "".join(json.dumps(record) + "\n" for record in records(names)))


def shards(folder):
    for number in range(2):
        datasets.Dataset.from_list(records()).to_parquet(folder / f"train-0000{number}-of-00002.parquet")
    return folder


def zipped(file):
    file.write_bytes(gzip.compress(b"text,label\n"))
    return file


def texts_per_class(folder):
    for name in NAMES:
        written(folder / name / "0.txt", "film\n" * 5)
    return folder


CASES = {
    "folder of class folders": folders,
    "folders Training, val_set, test2017 of class folders": lambda at: splits_of(at, "Training", "val_set", "test2017"),
    "class folders in one more folder": lambda at: splits_of(at, "photos"),
    "split folders inside class folders": lambda at: splits_of(at, *NAMES, classes=("train", "test")),
    "images in train and test, no class folders": lambda at: folders(at, ("train", "test")),
    "images in train and test, train.csv and test.csv with labels": lambda at: images_and_table(
        at, ("train", "test"), "train.csv", "test.csv"
    ),
    "images in one folder, labels.csv with labels": lambda at: images_and_table(at, ("images",), "labels.csv"),
    "images, metadata.csv with labels": lambda at: images_and_table(
        at, ("",), "metadata.csv", header="file_name,label"
    ),
    "class folders and a text file": lambda at: with_file(at, "cat/notes.txt"),
    "class folders and .ipynb_checkpoints with an image": lambda at: with_file(at, ".ipynb_checkpoints/0.png", image),
    "a class in test only": lambda at: folders(splits_of(at, "train", "test") / "test", ("eel",)).parent,
    "a class folder that is empty in test": lambda at: (
        (folders(at / "train"), folders(at / "test", ("cat",)), (at / "test" / "dog").mkdir()) and at
    ),
    "class folders cat and cat with a space": lambda at: folders(folders(at, ("cat ",), 2), each=4),
    "class folders Cat and cat": lambda at: folders(at, ("Cat", "cat")),
    "class folders with composed and decomposed accents": accents,
    "class folders reached by links": linked,
    "a png called .jpg": pngs_called_jpg,
    "CMYK, transparent, 16-bit and animated images": of_all_modes,
    "an empty image file": lambda at: with_file(at, "cat/9.png", lambda file: written(file, "")),
    "csv": lambda at: csv(at / "a.csv"),
    "csv from a spreadsheet: byte order mark, ;, Windows line ends": lambda at: written(
        at / "a.csv", csv(at / "b.csv").read_text().replace(",", ";").replace("\n", "\r\n"), "utf-8-sig"
    ),
    "csv in Latin-1": lambda at: csv(at / "a.csv", inputs=["schön"] * 10, encoding="latin-1"),
    "csv in UTF-16": lambda at: csv(at / "a.csv", encoding="utf-16"),
    "csv with empty lines, quoted commas and line breaks": lambda at: csv(
        at / "a.csv", inputs=['"one, ""two""\nthree"', '\n"a"'] * 5
    ),
    "csv with a text that has an unquoted comma": lambda at: csv(at / "a.csv", inputs=["x"] * 5 + ["a, b"] + ["x"] * 4),
    "tsv with texts that begin with a quote": lambda at: written(
        at / "a.tsv",
        csv(at / "b.csv", inputs=["x", "x", '"so" it', "x", '"so'] * 2).read_text().replace(",", "\t"),
    ),
    "csv with an index column without a name": lambda at: csv(
        at / "a.csv", inputs=[f"{number},film" for number in range(10)], header=",text,label"
    ),
    "csv with two columns of the same name": lambda at: csv(at / "a.csv", ("a,b", "b,a"), header="text,label,label"),
    "csv without a header": lambda at: csv(at / "a.csv", header="film,cat"),
    "csv without rows": lambda at: written(at / "a.csv", "text,label\n"),
    "csv with a row without a label": lambda at: csv(at / "a.csv", (*NAMES, "")),
    "csv with a class per row": lambda at: csv(at / "a.csv", range(10)),
    "csv with a column that names splits": lambda at: csv(
        at / "a.csv", ("cat,train", "dog,train", "cat,test", "dog,test"), header="text,label,split"
    ),
    "csv with paths of images": lambda at: images_and_table(at, ("my images",), "a.csv") / "a.csv",
    "csv with paths of images that are elsewhere": lambda at: csv(
        at / "a.csv", inputs=[f"x/{number}.png" for number in range(10)], header="image,label"
    ),
    "labels 001 and 01": lambda at: csv(at / "a.csv", ("001", "01")),
    "labels True and False": lambda at: csv(at / "a.csv", ("True", "False")),
    "labels 0.0 and 1.0": lambda at: csv(at / "a.csv", ("0.0", "1.0")),
    "labels a, b and a,b": lambda at: csv(at / "a.csv", ("a", "b", '"a,b"')),
    "labels ['a'] as text": lambda at: csv(at / "a.csv", ("['a']", "['b']")),
    "lists of labels in jsonl": lambda at: jsonl(at / "a.jsonl", (["a"], ["a ", "b"])),
    "Training.csv and Testing.csv": lambda at: tables(at, Training=NAMES, Testing=NAMES),
    "train.csv, test.csv without labels, sample_submission.csv": contest,
    "train.csv, validation.csv without labels": without_labels,
    "train.csv and test.jsonl": lambda at: jsonl(tables(at, train=NAMES) / "test.jsonl").parent,
    "integers in train.csv, words in test.csv": lambda at: tables(at, train=(0, 1), test=NAMES),
    "data.csv and notes.json": lambda at: written(tables(at, data=NAMES) / "notes.json", json.dumps([{"a": 1}])).parent,
    "labels.csv and test.csv": lambda at: tables(at, labels=NAMES, test=NAMES),
    "test_train.csv": lambda at: tables(at, test_train=NAMES),
    "parquet shards train-00000-of-00002": shards,
    "json: a list of records": lambda at: written(at / "a.json", json.dumps(records())),
    "json: an object with the list of records in one key": lambda at: written(
        at / "a.json", json.dumps({"version": 1, "data": records()})
    ),
    "json: an object of columns": lambda at: written(
        at / "a.json", json.dumps({"text": ["film"] * 10, "label": labels()})
    ),
    "json: texts that are objects": lambda at: written(
        at / "a.json", json.dumps([{**record, "text": {"body": "film"}} for record in records()])
    ),
    "an empty json file": lambda at: written(at / "a.json", ""),
    "a folder of text files per class": texts_per_class,
    "data.csv.gz": lambda at: zipped(at / "data.csv.gz"),
    "a path that does not exist": lambda at: at / "a.csv",
}


def read(source):
    """Splits with their sizes, and classes, as the page writes them."""
    splits = load_splits(str(source))
    columns = find_columns(splits)
    assert not any(check_images(splits, columns)[1].values())
    classes = ", ".join(columns.names) if columns.names else columns.problem_type
    several = "several of " * (columns.problem_type == "multi_label_classification")
    return ", ".join(f"{name} {len(split)}" for name, split in splits.items()), several + classes


def test_the_table_names_every_case_once():
    assert [row[0].replace("`", "") for row in ROWS] == list(CASES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].replace("`", ""))
@pytest.mark.newest
def test_rows(row, tmp_path, caplog):
    case, expected, classes, told = row
    source = CASES[case.replace("`", "")](tmp_path)
    if expected == "refused":
        with pytest.raises(DataError) as refusal:
            read(source)
        messages = str(refusal.value)
    else:
        assert read(source) == (expected, classes)
        messages = caplog.text
        assert told or "WARNING" not in messages
    for words in re.findall("`([^`]+)`", told):
        assert words in messages
