"""``hf-ft train --streaming``: training on a stream of rows ends with the same kind of checkpoint."""

import json
import re
from pathlib import Path

import datasets
import pytest
from safetensors.torch import load_file

from hf_ft.cli import main
from hf_ft.data.streamed import load_streamed
from tests.cli.test_cli import files, words

__all__ = ["files"]  # a fixture
ROLES = {"train": "train", "validation": None, "test": None}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Tables of texts with class names, one file per split; the last class appears late."""
    folder = tmp_path_factory.mktemp("reviews")
    for split, count in (("train", 150), ("validation", 10)):
        rows = [{"text": f"good film {i}", "label": "good" if i % 2 else "bad "} for i in range(count)]
        rows += [{"text": "film", "label": "late"}] * (split == "train")
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def train(model, dataset, output, *more):
    given = ["--model", str(model), "--dataset", str(dataset), "--output_dir", str(output), "--streaming"]
    return main(["train", *given, "--use_cpu", "true", "--per_device_train_batch_size", "8", *more])


@pytest.mark.slow
def test_texts_of_a_table(files, reviews, tmp_path, capsys):
    assert train(files / "bert", reviews, tmp_path / "a", "--max_steps", "4", "--strategy", "lp_ft") == 0
    printed = words(capsys.readouterr().out)
    assert "train streamed, 10 validation; 3 classes" in printed
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "late"}
    state = json.loads(next((tmp_path / "a").glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["eval_steps"] == 1 and state["max_steps"] == 4


@pytest.mark.slow
def test_photos_of_a_folder_are_measured_without_augmentation_and_resumed(files, tmp_path, capsys):
    """A folder of images is never copied, so rows can be held out from it."""
    saving = [
        "--max_steps",
        "4",
        "--save_steps",
        "2",
        "--eval_steps",
        "2",
        "--save_total_limit",
        "3",
        "--strategy=daft",
    ]
    assert train(files / "resnet", files / "photos", tmp_path / "a", *saving) == 0
    assert "train streamed, 4 validation, 8 test; 2 classes; augmentation: basic" in words(capsys.readouterr().out)
    whole = load_file(tmp_path / "a" / "checkpoint-4" / "model.safetensors")
    again = ["--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-2"), "--overwrite"]
    assert train(files / "resnet", files / "photos", tmp_path / "b", *saving, *again) == 0
    resumed = load_file(tmp_path / "b" / "checkpoint-4" / "model.safetensors")
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def test_labels_files_and_splits_of_a_stream(files, reviews):
    texts = load_streamed(str(reviews), names=ROLES)
    rows = list(texts.train)
    assert len(rows) == 151 and set(rows[0]) == {"text", "labels"} and rows[-1]["labels"] == 2
    assert {row["labels"] for row in rows[:4]} == {0, 1} and texts.columns.names == ("bad", "good", "late")
    photos = load_streamed(str(files / "photos"), names=ROLES)
    assert set(next(iter(photos.train))["image"]) == {"bytes", "path"}, "files are opened when they are collated"
    assert isinstance(texts.splits["validation"], datasets.Dataset)
    (Path(reviews) / "validation.jsonl").rename(reviews / "kept.txt")
    try:
        with pytest.raises(ValueError, match="no validation split.*set validation_split"):
            load_streamed(str(reviews), names=ROLES)
    finally:
        (reviews / "kept.txt").rename(reviews / "validation.jsonl")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--streaming needs --max_steps"),
        (("--max_steps=2", "--group_column=patient"), "--group_column patient has no effect: --streaming reads rows"),
        (("--max_steps=2", "--num_train_epochs=3"), "--num_train_epochs 3"),
        (("--max_steps=2", "--max_train_samples=3"), "--max_train_samples 3 has no effect"),
        (("--max_steps=2", "--class_weights=balanced"), "--class_weights balanced"),
        (("--max_steps=2", "--eval_strategy=epoch"), "--eval_strategy epoch"),
        (("--max_steps=2", "--frozen_cache=always"), "frozen_cache='always'"),
        (("--max_steps=2", "--strategy=daft", "--measure_samples=0"), "daft measures .*--measure_samples"),
        (("--max_steps=2", "--measure_samples=-1"), "--measure_samples -1 must be"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_anything_is_loaded(more, message, tmp_path, capsys):
    assert train("nobody/nothing", "nobody/nothing", tmp_path, *more) != 0
    assert re.search(message, words(capsys.readouterr().err))


def test_flags_of_a_stream_have_no_effect_without_one(tmp_path, capsys):
    assert main(["train", "--model=a", "--dataset=b", "--measure_samples=3"]) != 0
    assert "--measure_samples 3 has no effect without --streaming" in words(capsys.readouterr().err)
