"""Duplicates, contradicting labels, rare classes and shared groups are found before anything is trained."""

import io
import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from PIL import ImageEnhance

import hf_ft
from hf_ft.data import checked, checking, find_columns, on_duplicates
from hf_ft.data.check_results import FILE, DataChecks, Duplicates, Sample, to_drop
from hf_ft.data.duplicates import near_sets
from hf_ft.data.load import load_splits
from hf_ft.data.near import CORRELATION, near_images
from hf_ft.data.prints import image_print, text_print
from hf_ft.errors import DataError


def picture(seed, size=(64, 48)):
    """A smooth pattern of colours."""
    rng = np.random.default_rng(seed)
    small = rng.integers(40, 216, (6, 8, 1)) + rng.integers(-40, 40, 3)
    return Pillow.fromarray(small.astype(np.uint8)).resize(size, Pillow.Resampling.BICUBIC)


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Pillow.open(file).convert("RGB")


CHANGES = {
    "compressed": lambda image: jpeg(image, 60),
    "smaller": lambda image: image.resize((40, 30)),
    "larger": lambda image: image.resize((96, 72), Pillow.Resampling.BILINEAR),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_near_and_other_images_are_not(change):
    prints = [image_print(picture(seed)) for seed in range(40)]
    prints += [image_print(CHANGES[change](picture(seed))) for seed in (3, 5)]
    assert [rows.tolist() for rows in near_sets(prints)] == [[3, 40], [5, 41]]


def test_simple_images_are_compared_exactly_only():
    blank = [Pillow.new("RGB", (32, 32), (level, level, level)) for level in (0, 1, 255)]
    noisy = np.random.default_rng(0).integers(250, 256, (20, 32, 32, 3), dtype=np.uint8)
    assert near_sets([image_print(image) for image in [*blank, *map(Pillow.fromarray, noisy)]]) == []


def test_no_near_pair_is_lost():
    """The tree finds the same pairs as comparing all with all."""
    rng = np.random.default_rng(0)
    some = rng.integers(0, 256, (150, 768)).astype(float)
    nearly = some[:60] + rng.normal(0, rng.uniform(1, 8, (60, 1)), (60, 768))
    sketches = np.clip(np.concatenate([some, nearly, some[:3]]), 0, 255).astype(np.uint8)
    correlations = np.corrcoef(sketches.astype(float))
    expected = np.argwhere(np.triu(correlations >= CORRELATION, 1))
    assert 20 < len(expected) < 66  # some are below
    np.testing.assert_array_equal(near_images(sketches), expected)


TEXT = "the quick brown fox jumps over the lazy dog while seven other animals watch from a hill near the old river bank"


def test_texts():
    texts = ["Good Movie!", "good  movie! ", "good movie?", TEXT, TEXT.replace("hill", "rock").upper() + "?", TEXT[:60]]
    prints = [text_print([text]) for text in texts]
    assert prints[0].same == prints[1].same != prints[2].same
    assert near_sets(prints) == []  # one word is in three of some twenty rows of three
    long = f"{TEXT} {TEXT[::-1]} {TEXT.swapcase()}"
    assert [r.tolist() for r in near_sets([*prints, *(text_print([t]) for t in (long, long + " Yes."))])] == [[6, 7]]
    assert text_print([":-)"]).same != text_print([":-("]).same
    assert text_print(["a b", "c"]).same != text_print(["a", "b c"]).same


def folder(tmp_path, **splits):
    """An image folder: the files of each split, and the image in each."""
    for split, files in splits.items():
        for name, image in files.items():
            file = tmp_path / "data" / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return load_splits(str(tmp_path / "data"))


@pytest.fixture
def splits(tmp_path):
    """A copy within train with another label, one in test in another format, and a near copy in test."""
    train = {f"{'cat' if n % 2 else 'dog'}/{n}.png": picture(n) for n in range(12)}
    train |= {"dog/copy.bmp": picture(1), "eel/1.png": picture(90)}
    validation = {"cat/a.png": picture(50), "dog/b.png": picture(51), "dog/c.png": picture(51)}
    test = {"cat/x.bmp": picture(3), "dog/y.jpg": picture(4), "cat/z.png": picture(60)}
    return folder(tmp_path, train=train, validation=validation, test=test)


SAID = [
    "1 sample of train equal to others in it",
    "1 sample of test equal to train",
    "1 sample of validation equal to others in it",
    "1 set of equal samples with different labels",
    "1 sample of test nearly equal to train",
]


def test_images_within_and_between_splits(splits, tmp_path):
    found = hf_ft.check_data(splits)
    assert sorted(found.sentences()[:5]) == sorted(SAID)
    assert found.sentences()[5:] == [
        "1 class with a single training sample: eel",
        "validation has no sample of 1 class: eel",
        "test has no sample of 1 class: eel",
    ]
    [twins] = [one for one in found.duplicates if one.disagree]
    assert [str(sample) for sample in twins.samples] == [
        "train 0 (train/cat/1.png): cat",
        "train 12 (train/dog/copy.bmp): dog",
    ]
    assert str(tmp_path) not in json.dumps(found.to_dict())
    assert DataChecks.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert len(found.first(2).duplicates) == 2 and found.first(1).duplicates[0].splits == ("train", "test")


def test_drop_and_refuse(splits, tmp_path):
    columns = find_columns(splits)
    kept, found = checked(splits, columns, "drop", folder=tmp_path / "out")
    files = {
        value["path"].split("/data/")[1] for value in kept["train"].cast_column("image", Image(decode=False))["image"]
    }
    gone = {"train/cat/1.png", "train/dog/copy.bmp", "train/cat/3.png", "train/dog/4.png"}
    assert len(files) == 10 and not files & gone and found.dropped == 4
    assert "4 of 14 samples of train dropped as duplicates" in found.sentences()
    assert len(kept["validation"]) == len(kept["test"]) == 3
    with pytest.raises(DataError, match=f"different labels.*{FILE} lists them.*on_duplicates='drop'"):
        checked(splits, columns, "refuse", folder=tmp_path / "out")
    alone = DatasetDict(train=splits["train"].select([2, 3, 4]), test=splits["test"].select([2]))
    assert checked(alone, columns, "refuse")[0] is alone
    same, found = checked(splits, columns, "ignore")
    assert same is splits and found.sentences()[0] == "duplicates are ignored" and not found.duplicates
    with pytest.raises(DataError, match="on_duplicates='keep' is unknown"):
        checked(splits, columns, "keep")


def sample(split, row, label="a"):
    return Sample(split, row, label=label)


@pytest.mark.parametrize(
    ("kind", "samples", "rows"),
    [
        ("same", [sample("train", 3), sample("train", 5), sample("train", 7)], {5, 7}),
        ("same", [sample("train", 3), sample("train", 5, "b")], {3, 5}),
        ("same", [sample("train", 3), sample("train", 5), sample("test", 0, "b")], {3, 5}),
        ("same", [sample("validation", 3), sample("test", 5)], set()),
        ("near", [sample("train", 3), sample("train", 5, "b")], set()),
        ("near", [sample("train", 3), sample("validation", 3)], {3}),
    ],
)
def test_what_is_dropped(kind, samples, rows):
    assert to_drop([Duplicates(kind, tuple(samples))]) == rows


def test_what_was_found_before_is_not_looked_for_again(splits, tmp_path, monkeypatch):
    columns = find_columns(splits)
    _, found = checked(splits, columns, "drop", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found.save(tmp_path / "out")
    looked = []
    monkeypatch.setattr(on_duplicates, "check_data", lambda *args, **more: looked.append(1) or DataChecks({"train": 1}))
    again, same = checked(splits, columns, "drop", folder=tmp_path / "out")
    assert same == found and len(again["train"]) == 10 and not looked
    file = next((tmp_path / "data" / "train" / "cat").iterdir())
    picture(99).save(file)  # the same name, different content
    checked(splits, columns, "warn", folder=tmp_path / "out")
    assert looked == [1]
    (tmp_path / "out" / FILE).write_text("{")  # as by a full disk
    checked(splits, columns, "warn", folder=tmp_path / "out")
    assert looked == [1, 1]


def test_sounds_are_equal_in_any_format(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    tone = (np.sin(np.arange(800) * 0.3) * 9999).astype(np.int16)
    for name, samples in (("up/a.wav", tone), ("up/b.flac", tone), ("down/c.wav", -tone), ("down/d.wav", tone[:-1])):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "data" / name, samples, 8000)
    found = hf_ft.check_data(load_splits(str(tmp_path / "data"), validation_fraction=0.5))
    assert [len(one.samples) for one in found.duplicates] == [2]
    assert {one.file for one in found.duplicates[0].samples} == {"up/a.wav", "up/b.flac"}


def table(tmp_path, rows, name="data.csv"):
    file = tmp_path / name
    file.write_text("\n".join(["text,label,patient", *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(file)


def test_texts_with_groups(tmp_path):
    """Each patient has rows of one or two classes, and is in only one of the splits that are made."""
    rng = np.random.default_rng(0)
    rows = [
        (f"text {n} {p}", "abc"[(p + n // 4) % 3], f"p{p}") for p in range(30) for n in range(int(rng.integers(1, 8)))
    ]
    source = table(tmp_path, rows)
    for more in ({}, {"labelled": 40}, {"seed": 1}, {"validation_fraction": 0.5, "max_train_samples": 30}):
        made = load_splits(source, group_column="patient", test_fraction=0.25, **more)
        patients = {name: set(split["patient"][:]) for name, split in made.items()}
        assert not patients["train"] & patients["validation"]
        assert not (patients["train"] | patients["validation"]) & patients["test"]
        assert set(made["train"]["label"][:]) == {"a", "b", "c"}
        assert abs(len(made["test"]) / len(rows) - 0.25) < 0.06
        assert hf_ft.check_data(made, group_column="patient").shared == ()
    assert len(load_splits(source, group_column="patient", labelled=40)["train"]) < 40
    again = load_splits(source, group_column="patient", test_fraction=0.25)
    assert (
        again["test"]["text"][:] == load_splits(source, group_column="patient", test_fraction=0.25)["test"]["text"][:]
    )
    parted = load_splits(source, test_fraction=0.25)
    assert any(
        "share" in said and "groups" in said for said in hf_ft.check_data(parted, group_column="patient").sentences()
    )


def test_groups_that_cannot_be_split(tmp_path):
    source = table(tmp_path, [(f"t{n}", "ab"[n % 2], "p") for n in range(10)])
    with pytest.raises(DataError, match="all 10 training rows have the same 'patient'"):
        load_splits(source, group_column="patient")
    with pytest.raises(DataError, match=r"no column 'ward', only \['text', 'label', 'patient'\]: set group_column"):
        load_splits(source, group_column="ward")
    with pytest.raises(DataError, match="column 'label' holds the labels, so whole classes would be held out: set"):
        load_splits(source, group_column="label")


def test_each_file_may_be_a_group(tmp_path):
    """The column of the groups is also that of the inputs."""
    rows = [(tmp_path / f"{number}.png", "ab"[number % 2]) for number in range(10)]
    for path, _ in rows:
        picture(1).save(path)
    (tmp_path / "table.csv").write_text("\n".join(["image,label", *(f"{path},{label}" for path, label in rows)]))
    splits = load_splits(str(tmp_path / "table.csv"), group_column="image")
    assert set(on_duplicates.data_keys(splits, find_columns(splits), "image")) == {"train", "validation"}


def test_shared_groups_are_counted_and_rows_without_a_group_are_alone():
    features = Features(text=Value("string"), label=ClassLabel(names=["a", "b"]), who=Value("string"))

    def split(start, who):
        content = {"text": [f"t{start + n}" for n in range(len(who))], "label": [0, 1] * (len(who) // 2), "who": who}
        return Dataset.from_dict(content, features=features)

    made = DatasetDict(train=split(0, ["x", "x", "y", None]), test=split(10, ["x", "z", None, "y"]))
    [shared] = hf_ft.check_data(made, group_column="who").shared
    assert (shared.groups, shared.rows) == (2, (3, 2))
    assert str(shared) == "train and test share 2 groups (3 and 2 samples)"


def test_labels_of_any_kind(tmp_path):
    texts = ["same text", "same text", "another"]
    numbers = DatasetDict(train=Dataset.from_dict({"text": texts, "label": [0.5, 0.75, 1.0]}))
    several = DatasetDict(train=Dataset.from_dict({"text": texts, "label": [["a"], ["a"], ["b", "a"]]}))
    assert [one.disagree for one in hf_ft.check_data(numbers).duplicates] == [True]
    assert [one.disagree for one in hf_ft.check_data(several).duplicates] == [False]
    hidden = Dataset.from_dict({"text": ["same text"], "label": [None]}, features=numbers["train"].features)
    found = hf_ft.check_data(DatasetDict(train=numbers["train"], test=hidden))
    assert "1 sample of test equal to train" in found.sentences()
    assert checking.quick_checks(numbers, find_columns(numbers), None).clean
