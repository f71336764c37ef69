"""Real files in, batches out: what is found, split off and augmented, and what the errors say."""

import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MobileNetV2ImageProcessorPil, PreTrainedTokenizerFast

from hf_ft.data import load
from hf_ft.data.augment import flip_and_shift
from hf_ft.data.columns import ROW, find_columns
from hf_ft.data.load import load_splits
from hf_ft.data.prepare import collate, image_transform, prepare
from hf_ft.models.ensemble.processor import combined


@pytest.fixture(scope="module")
def processor():
    return MobileNetV2ImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)


def make_tokenizer(*words, unit=pre_tokenizers.Whitespace):
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = unit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("good", "bad", "film")


def write_images(folder, per_class, names=("cat", "dog"), size=(24, 20)):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 255, size=(size[1], size[0]), dtype=np.uint8)  # grey
            Image.fromarray(pixels).save(folder / name / f"test_{number}.png")  # a name that looks like a split
    return folder


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


REVIEWS = [f"good film {n},positive" for n in range(12)] + [f"bad film {n},negative" for n in range(8)]


# Reading


def test_class_folders_are_carved_stratified_and_seeded(tmp_path):
    source = str(write_images(tmp_path / "pets", 10))
    splits = load_splits(source, validation_fraction=0.3, seed=1)
    assert {name: len(split) for name, split in splits.items()} == {"train": 14, "validation": 6}
    assert sorted(splits["validation"]["label"][:]) == [0, 0, 0, 1, 1, 1]
    assert splits["train"].features["label"].names == ["cat", "dog"]
    rows = {name: set(split[ROW][:]) for name, split in splits.items()}
    assert rows["train"] | rows["validation"] == set(range(20)) and not rows["train"] & rows["validation"]
    again, other = (load_splits(source, validation_fraction=0.3, seed=seed) for seed in (1, 2))
    assert again["train"][ROW][:] == splits["train"][ROW][:] != other["train"][ROW][:]


def test_split_folders_keep_their_splits_and_share_classes(tmp_path):
    for name, count in {"train": 4, "val": 2, "test": 3}.items():
        write_images(tmp_path / "pets" / name, count)
    splits = load_splits(str(tmp_path / "pets"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "validation": 4, "test": 6}


def test_a_class_called_train_is_no_split(tmp_path):
    splits = load_splits(str(write_images(tmp_path / "vehicles", 5, names=("bus", "train"))))
    assert splits["train"].features["label"].names == ["bus", "train"]
    assert sum(len(split) for split in splits.values()) == 10


def test_test_split_is_never_used_for_validation(tmp_path):
    for name in ("train", "test"):
        write_csv(tmp_path / f"{name}.csv", REVIEWS if name == "train" else REVIEWS[::4])
    splits = load_splits(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "validation": 4, "test": 5}
    assert not set(splits["validation"]["text"][:]) & set(splits["train"]["text"][:])


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_table_files(tmp_path, suffix):
    table = datasets.Dataset.from_dict({"text": ["good, film", "bad film"] * 5, "label": ["yes", "no"] * 5})
    path = tmp_path / f"reviews.{suffix}"
    if suffix in ("csv", "tsv"):
        table.to_csv(path, sep="," if suffix == "csv" else "\t")
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, lines=suffix == "jsonl")
    splits = load_splits(str(path))
    assert len(splits["train"]) == 8 and splits["train"]["text"][:].count("good, film") == 4


def test_folder_written_by_save_to_disk(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a"] * 10, "label": [0, 1] * 5})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, validation=table).save_to_disk(tmp_path / "two")
    assert len(load_splits(str(tmp_path / "one"))["validation"]) == 2
    assert len(load_splits(str(tmp_path / "two"))["validation"]) == 10


def test_max_train_samples_keeps_class_shares(tmp_path):
    splits = load_splits(write_csv(tmp_path / "a.csv", REVIEWS), validation_fraction=0.5, max_train_samples=5)
    assert sorted(splits["train"]["label"][:]) == ["negative"] * 2 + ["positive"] * 3
    assert len(splits["validation"]) == 10


def test_a_test_part_is_carved_first_and_stays_the_same(tmp_path):
    source = write_csv(tmp_path / "a.csv", REVIEWS * 5)  # 60 positive, 40 negative

    def rows(**options):
        splits = load_splits(source, **options)
        return {name: split[ROW][:] for name, split in splits.items()}

    assert list(rows()) == ["train", "validation"]
    splits = load_splits(source, test_fraction=0.3)
    assert {name: len(split) for name, split in splits.items()} == {"train": 56, "validation": 14, "test": 30}
    assert splits["test"]["label"][:].count("positive") == 18
    found = rows(test_fraction=0.3)
    assert sorted(sum(found.values(), [])) == list(range(100))
    assert found == rows(test_fraction=0.3) and set(found["test"]) != set(rows(test_fraction=0.3, seed=1)["test"])
    for options in ({"labelled": 20}, {"validation_fraction": 0.5}, {"max_train_samples": 10}):
        assert rows(test_fraction=0.3, **options)["test"] == found["test"]
    with pytest.raises(ValueError, match="test_fraction=1.0 of 100 rows leaves a split empty: set test_fraction"):
        rows(test_fraction=1.0)
    with pytest.raises(ValueError, match=r"of 100 rows leaves a split empty: give more rows, set a larger test_fract"):
        rows(test_fraction=0.001)


def test_what_cannot_be_a_hub_id_is_not_looked_up(monkeypatch):
    monkeypatch.setattr("hf_ft.data.files.load_dataset", lambda *_, **__: pytest.fail("looked up on the Hub"))
    for source in ("nowhere/", "photos/cat/1.jpg", "./nowhere"):
        with pytest.raises(ValueError, match="which is not a local file or folder .*no such file or folder"):
            load_splits(source)


def test_a_test_split_of_the_source_wins(tmp_path):
    for name, part in (("train", REVIEWS), ("test", REVIEWS[::4])):
        write_csv(tmp_path / f"{name}.csv", part)
    splits = load_splits(str(tmp_path), test_fraction=0.5)
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "validation": 4, "test": 5}


def test_a_test_split_without_labels_is_replaced(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(load.logger, "propagate", True)
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["n", "p"]))
    train = datasets.Dataset.from_dict({"text": ["a"] * 20, "label": [0, 1] * 10}, features=features)
    for name, test in (
        ("hidden", datasets.Dataset.from_dict({"text": ["b"] * 3, "label": [-1] * 3}, features=features)),
        ("none", datasets.Dataset.from_dict({"text": ["b"] * 3})),
    ):
        datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / name)
        assert len(load_splits(str(tmp_path / name))["test"]) == 3
        splits = load_splits(str(tmp_path / name), test_fraction=0.2)
        assert {key: len(split) for key, split in splits.items()} == {"train": 13, "validation": 3, "test": 4}
        assert set(splits["test"]["text"][:]) == {"a"} and "part of train is held out" in caplog.text
        caplog.clear()


def test_labelled_rows_are_those_of_train_and_validation(tmp_path):
    source = write_csv(tmp_path / "a.csv", REVIEWS * 5)
    splits = load_splits(source, labelled=50, test_fraction=0.2)
    assert {name: len(split) for name, split in splits.items()} == {"train": 40, "validation": 10, "test": 20}
    assert [splits[name]["label"][:].count("positive") for name in splits] == [24, 6, 12]
    rows = {name: set(split[ROW][:]) for name, split in splits.items()}
    assert len(set.union(*rows.values())) == 70
    again, other = (load_splits(source, labelled=50, test_fraction=0.2, seed=seed) for seed in (0, 1))
    assert again["train"][ROW][:] == splits["train"][ROW][:] != other["train"][ROW][:]
    for labelled in (101, 1, 0):
        with pytest.raises(ValueError, match=f"labelled={labelled} rows cannot be drawn from 100 of train rows"):
            load_splits(source, labelled=labelled)


def test_labelled_rows_of_a_source_with_a_validation_split(tmp_path):
    for name in ("train", "val"):
        write_csv(tmp_path / f"{name}.csv", REVIEWS * 2)
    splits = load_splits(str(tmp_path), labelled=20)
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "validation": 4}
    few = load_splits(str(tmp_path), labelled=50, validation_fraction=0.5)
    assert {name: len(split) for name, split in few.items()} == {"train": 25, "validation": 25}
    with pytest.raises(ValueError, match="labelled=80 rows cannot be drawn from 40 of train, 40 of validation rows"):
        load_splits(str(tmp_path), labelled=80)
    table = datasets.Dataset.from_dict({"text": ["a"] * 20, "label": ["x", "y"] * 10})
    gaps = datasets.Dataset.from_dict({"text": ["a"] * 4, "label": ["x", "y", None, "y"]})
    datasets.DatasetDict(train=table, validation=gaps).save_to_disk(tmp_path / "gaps")
    found = load_splits(str(tmp_path / "gaps"), labelled=20)
    with pytest.raises(ValueError, match="split 'validation': 1 rows have no 'label'"):
        find_columns(found)


def test_images_of_a_table_are_found_beside_it(tmp_path, processor):
    write_images(tmp_path / "images", 3)
    rows = [f"images/{name}/test_{n}.png,{name}" for name in ("cat", "dog") for n in range(3)]
    splits = load_splits(write_csv(tmp_path / "table.csv", rows, "file_name,label"), validation_fraction=0.34)
    columns = find_columns(splits)
    assert (columns.task, columns.inputs, columns.names) == ("image", ("file_name",), ("cat", "dog"))
    ready = prepare(splits, processor, columns)
    assert ready["train"][0]["pixel_values"].shape == (3, 16, 16)
    assert ready["train"].features["labels"].names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "fit"}, r"no split 'fit', only \['train', 'validation'\].*: set train_split"),
        ({"validation_split": "held"}, r"no split 'held'.*: set validation_split"),
        ({"test_split": "held"}, r"no split 'held'.*: set test_split"),
    ],
)
def test_missing_split_names_the_argument(tmp_path, options, message):
    table = datasets.Dataset.from_dict({"text": ["a"] * 4, "label": [0, 1] * 2})
    datasets.DatasetDict(train=table, validation=table).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / "data"), **options)


def test_unreadable_sources_and_fractions_are_named(tmp_path):
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.docx.*elpv, mnist5k, uci_digits.*\.csv"):
        load_splits(str(tmp_path / "notes.docx"))
    with pytest.raises(ValueError, match="no such file or folder"):
        load_splits(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="set validation_fraction"):
        load_splits(write_csv(tmp_path / "a.csv", REVIEWS), validation_fraction=1.0)
    with pytest.raises(ValueError, match="max_train_samples=0 must be at least 1"):
        load_splits(write_csv(tmp_path / "a.csv", REVIEWS), max_train_samples=0)


# Columns


def test_string_and_integer_labels_are_numbered_alike_in_all_splits():
    train = datasets.Dataset.from_dict({"text": ["a"] * 4, "label": [7, 3, 7, 5]})
    test = datasets.Dataset.from_dict({"text": ["a"] * 2, "label": [5, 3]})
    columns = find_columns(datasets.DatasetDict(train=train, test=test))
    assert columns.id2label == {0: "3", 1: "5", 2: "7"} and columns.num_labels == 3
    assert columns.encode([7, 3, 7]) == [2, 0, 2] and columns.encode([5, 3]) == [1, 0]


def test_kinds_of_labels():
    def kind(values, feature):
        features = datasets.Features(text=datasets.Value("string"), label=feature)
        return find_columns(datasets.Dataset.from_dict({"text": ["a"] * 2, "label": values}, features=features))

    regression = kind([0.5, 2.0], datasets.Value("float32"))
    assert (regression.problem_type, regression.num_labels, regression.id2label) == ("regression", 1, None)
    classes = datasets.ClassLabel(names=["x", "y", "z"])
    many = kind([[0, 2], []], datasets.List(classes))
    assert many.problem_type == "multi_label_classification"
    assert many.encode([[0, 2], []]) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="of type List.*set label_column"):
        kind([[["x"]], [["y"]]], datasets.List(datasets.List(datasets.Value("string"))))


def test_row_without_label_is_named_by_its_place_in_the_file(tmp_path):
    splits = load_splits(write_csv(tmp_path / "a.csv", [*REVIEWS, "fine film,"]))
    with pytest.raises(ValueError, match="1 rows have no 'label'.*is row 20"):
        find_columns(splits)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"text": ["a"], "grade": [1]}, {}, r"no label column among \['text', 'grade'\].*set label_column"),
        ({"text": ["a"], "label": [1]}, {"label_column": "x"}, "no column 'x'.*set label_column"),
        ({"body": ["a"], "label": [1]}, {}, r"no image, audio or text column.*\['body', 'label'\].*set image_column"),
        ({"body": ["a"], "label": [1]}, {"text_column": "text"}, "no column 'text'.*set text_column"),
        ({"body": ["a"], "label": [1]}, {"image_column": "image"}, "no column 'image'.*set image_column"),
        ({"text": ["a", "b"], "label": ["x", None]}, {}, "1 rows have no 'label'.*row 1"),
    ],
)
def test_missing_columns_are_named_with_what_there_is(data, options, message):
    with pytest.raises(ValueError, match=message):
        find_columns(datasets.Dataset.from_dict(data), **options)


# Images


@pytest.fixture
def pets(tmp_path):
    return load_splits(str(write_images(tmp_path / "pets", 5)))


def test_prepared_images_stack_and_come_from_one_call(pets, processor):
    class Counting:
        calls = 0

        def __call__(self, **kwargs):
            self.calls += 1
            return processor(**kwargs)

    counting = Counting()
    columns = find_columns(pets)
    ready = prepare(pets, counting, columns)
    rows = ready["train"].__getitems__([0, 1, 2, 3])
    assert counting.calls == 1 and set(rows[0]) == {"pixel_values", "labels"}
    batch = collate(counting)(rows)
    assert batch["pixel_values"].shape == (4, 3, 16, 16) and batch["labels"].dtype == torch.int64
    assert ready["train"].with_format(None)["labels"][:4] == batch["labels"].tolist()


def test_augmentation_changes_train_only(pets, processor):
    columns = find_columns(pets)
    plain, basic = (prepare(pets, processor, columns, augment=augment) for augment in ("none", "basic"))

    def pixels(split):
        return torch.stack(split[:]["pixel_values"])

    assert torch.equal(pixels(plain["validation"]), pixels(basic["validation"]))
    random.seed(0)
    first = pixels(basic["train"])
    assert not torch.equal(first, pixels(plain["train"])) and not torch.equal(first, pixels(basic["train"]))
    random.seed(0)
    assert torch.equal(first, pixels(basic["train"]))


def test_each_part_of_a_processor_sees_the_same_augmented_images(pets, processor):
    other = MobileNetV2ImageProcessorPil(size={"height": 24, "width": 24}, do_center_crop=False, image_mean=[0.4] * 3)
    columns = find_columns(pets)

    def batch(processor):
        random.seed(5)
        return collate(processor)(prepare(pets, processor, columns, "basic")["train"].__getitems__([0, 3, 1]))

    both, first, second = map(batch, (combined([processor, other]), processor, other))
    assert set(both) == {"pixel_values", "pixel_values_1", "labels"}
    assert torch.equal(both["pixel_values"], first["pixel_values"])
    assert torch.equal(both["pixel_values_1"], second["pixel_values"])
    assert torch.equal(both["labels"], first["labels"])


def test_flip_and_shift_keeps_the_size_and_reflects():
    image = Image.fromarray(np.arange(24 * 16, dtype=np.uint16).reshape(16, 24).astype(np.uint8)).convert("RGB")
    random.seed(3)
    seen = {flip_and_shift(image).tobytes() for _ in range(50)}
    assert len(seen) > 20
    assert all(flip_and_shift(image).size == (24, 16) for _ in range(20))
    column = Image.fromarray(np.arange(16, dtype=np.uint8)[:, None].repeat(2, axis=1))
    shifted = {tuple(np.asarray(flip_and_shift(column))[:, 0]) for _ in range(200)}
    reflect = {tuple(np.pad(range(16), 2, mode="reflect")[start : start + 16]) for start in range(5)}
    assert shifted == reflect


def test_a_damaged_image_is_named_by_row_and_path(tmp_path, processor):
    folder = write_images(tmp_path / "pets", 5)
    damaged = folder / "dog" / "test_2.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    splits = load_splits(str(folder))
    ready = prepare(splits, processor, find_columns(splits))
    with pytest.raises(ValueError, match=r"row 7 \(.*dog/test_2\.png\)"):
        for split in ready.values():
            split[:]


@pytest.mark.newest
def test_transform_works_on_a_plain_data_set_and_refuses_unknown_augmentation(processor):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    images = [np.full((9, 9), 200, dtype=np.uint8)] * 2
    plain = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
    plain.set_transform(image_transform(processor, find_columns(plain), "basic"))
    assert plain[1]["labels"] == 1 and plain[0]["pixel_values"].shape == (3, 16, 16)
    with pytest.raises(ValueError, match="'heavy'.*none, basic"):
        image_transform(processor, find_columns(plain), "heavy")


# Text


def test_prepared_text_is_truncated_and_padded(tmp_path, tokenizer):
    splits = load_splits(write_csv(tmp_path / "a.csv", [*REVIEWS, "good good good good good,positive"]))
    columns = find_columns(splits)
    assert (columns.task, columns.inputs, columns.names) == ("text", ("text",), ("negative", "positive"))
    ready = prepare(splits, tokenizer, columns, max_length=4)
    train, validation = ready["train"], ready["validation"]
    batch = collate(tokenizer)([train[row] for row in range(len(train))] + [validation[0], validation[1]])
    assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() <= 4
    assert train["labels"][:] == columns.encode(splits["train"]["label"][:])
    cut = prepare(splits, tokenizer, columns, max_length=2)["train"]
    assert {len(ids) for ids in cut["input_ids"][:]} == {2}
    assert set(ready["train"].column_names) <= {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_text_for_several_tokenizers(tmp_path, tokenizer):
    splits = load_splits(write_csv(tmp_path / "a.csv", [*REVIEWS, "bad good bad,negative"]))
    columns = find_columns(splits)
    digits = make_tokenizer("film", *map(str, range(9)), unit=lambda: pre_tokenizers.Digits(individual_digits=True))

    def batch(tokenizer):
        ready = prepare(splits, tokenizer, columns, max_length=3)["train"]
        return collate(tokenizer)([ready[row] for row in range(len(ready))])

    both, first, second = map(batch, (combined([tokenizer, digits, tokenizer]), tokenizer, digits))
    wanted = {**first, **{f"{name}_1": tensor for name, tensor in second.items() if name != "labels"}}
    assert both.keys() == wanted.keys() and all(torch.equal(both[name], wanted[name]) for name in wanted)
    assert both["input_ids"].shape != both["input_ids_1"].shape or not torch.equal(
        both["input_ids"], both["input_ids_1"]
    )


def test_text_pairs_and_missing_text(tokenizer):
    data = {"premise": ["good", "bad"], "hypothesis": ["film", None], "label": [0, 1]}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(data))
    columns = find_columns(splits)
    assert columns.inputs == ("premise", "hypothesis") == find_columns(splits, text_column="premise, hypothesis").inputs
    with pytest.raises(ValueError, match="row 1 has no text in column 'hypothesis'"):
        prepare(splits, tokenizer, columns)


def test_hidden_test_labels_leave_the_test_split_out(tokenizer):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["n", "p"]))
    train = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}, features=features)
    test = datasets.Dataset.from_dict({"text": ["film"], "label": [-1]}, features=features)
    splits = datasets.DatasetDict(train=train, validation=train, test=test)
    assert list(prepare(splits, tokenizer, find_columns(splits))) == ["train", "validation"]
    with pytest.raises(ValueError, match="split 'validation': 1 rows have no 'label'"):
        find_columns(datasets.DatasetDict(train=train, validation=test))
