"""Predictions equal the model's on single samples in float64, for any batch size; damaged files are reported."""

import shutil

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image, ImageOps
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from hf_ft import FTTrainer
from hf_ft.data import find_columns, load_splits
from hf_ft.data.task import Data, process
from hf_ft.errors import CheckpointError, DataError, OptionError
from hf_ft.inference import Reading, evaluate, load_trained, predict
from hf_ft.metrics import classification_metrics
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.testing.families import tiny
from hf_ft.testing.models import tiny_resnet
from tests.trained import CLASSES, NAMES, TRUTH


def softmax(logits):
    return torch.softmax(logits.double(), -1)


def alone(folder, files, change=lambda image: image):
    """The probabilities of each image by itself."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    images = [change(Image.open(file).convert("RGB")) for file in files]
    with torch.no_grad():
        return torch.cat([softmax(model(**processor(image, return_tensors="pt")).logits) for image in images]).numpy()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_probabilities_are_those_of_single_images(files, batch_size):
    found = list(predict(files / "resnet", files / "photos", batch_size=batch_size))
    photos = sorted((files / "photos").rglob("*.png"))
    assert [one.file for one in found] == list(map(str, photos)) and [one.label for one in found] == TRUTH
    wanted = alone(files / "resnet", photos)
    assert wanted.std() > 1e-4
    np.testing.assert_allclose([one.outputs for one in found], wanted, atol=1e-6)
    both = (wanted + alone(files / "resnet", photos, ImageOps.mirror)) / 2
    assert np.abs(both - wanted).max() > 1e-5
    flipped = predict(files / "resnet", files / "photos", batch_size=batch_size, tta=True)
    np.testing.assert_allclose([one.outputs for one in flipped], both, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 10])
def test_texts_of_other_lengths_do_not_change_an_answer(files, batch_size):
    table = load_dataset("csv", data_files=str(files / "reviews.csv"), split="train")
    model = AutoModelForSequenceClassification.from_pretrained(files / "bert")
    tokenizer = AutoTokenizer.from_pretrained(files / "bert")
    with torch.no_grad():
        wanted = [softmax(model(**tokenizer(text, return_tensors="pt")).logits)[0].numpy() for text in table["body"]]
    reading = Reading(text_column="body")
    found = list(predict(files / "bert", files / "reviews.csv", reading=reading, batch_size=batch_size))
    assert [one.label for one in found] == [1, 0] * 5 and [one.row for one in found] == list(range(10))
    np.testing.assert_allclose([one.outputs for one in found], wanted, atol=1e-6)


def test_sounds_of_other_lengths_do_not_change_an_answer(tmp_path):
    """Wav2Vec2 normalises over time, so padding would change features even if a mask hides it."""
    soundfile = pytest.importorskip("soundfile")
    from transformers import Wav2Vec2FeatureExtractor

    model, extractor = tiny("Wav2Vec2ForSequenceClassification"), Wav2Vec2FeatureExtractor(sampling_rate=8000)
    sounds = [
        np.random.default_rng(i).normal(0, 0.1, size).astype(np.float32) for i, size in enumerate((900, 1600, 900))
    ]
    for i, sound in enumerate(sounds):
        soundfile.write(tmp_path / f"{i}.wav", sound, 8000, subtype="FLOAT")
    with torch.no_grad():
        singles = [extractor(sound, sampling_rate=8000, return_tensors="pt").input_values for sound in sounds]
        wanted = [softmax(model.eval()(single).logits)[0].numpy() for single in singles]
    found = list(predict(model, tmp_path, processor=extractor))
    np.testing.assert_allclose([one.outputs for one in found], wanted, atol=1e-6)


def test_scores_are_those_of_the_trainer(files, tmp_path):
    splits = load_splits(str(files / "photos"))
    trained = load_trained(files / "resnet")
    processed = process(Data(splits, find_columns(splits)), trained.model, trained.processor)
    args = TrainingArguments(tmp_path, use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = FTTrainer(
        trained.model, args, eval_dataset=processed.splits["train"], compute_metrics=classification_metrics
    )
    wanted = trainer.evaluate()
    rows = splits["train"].remove_columns("__row__")
    found = evaluate(trained.model, rows, processor=trained.processor, batch_size=4)
    assert found.rows == len(rows) and found.confusion.classes == CLASSES
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert found.scores[name] == wanted[f"eval_{name}"]
    assert found.scores["log_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-5)


def test_a_damaged_image_is_reported_and_the_others_are_predicted(files, tmp_path):
    shutil.copytree(files / "photos", tmp_path / "photos")
    damaged = tmp_path / "photos" / "dog" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    found = list(predict(files / "resnet", tmp_path / "photos", batch_size=8, tta=True))
    wrong = [one for one in found if one.error]
    assert [one.file for one in wrong] == [str(damaged)] and wrong[0].outputs is None and len(found) == 12
    assert "cannot read the image in row 5" in wrong[0].error
    whole = list(predict(files / "resnet", files / "photos", batch_size=8, tta=True))
    np.testing.assert_allclose(found[6].outputs, whole[6].outputs, atol=1e-6)
    scored = evaluate(files / "resnet", tmp_path / "photos")
    assert scored.rows == 11 and [name for name, _ in scored.unreadable] == [str(damaged)]


def test_several_labels_and_numbers(files):
    rows = load_splits(str(files / "photos"))["train"]
    rows = rows.select_columns(["image"]).add_column("label", [["eel", "cat"]] * len(rows))
    model = tiny_resnet(problem_type="multi_label_classification", **NAMES)
    processor = AutoImageProcessor.from_pretrained(files / "resnet")
    first = next(predict(model, rows, processor=processor))
    assert first.label == [1.0, 0.0, 1.0] and abs(first.outputs.sum() - 1) > 1e-3
    numbers = rows.remove_columns("label").add_column("label", [0.5] * len(rows))
    found = evaluate(tiny_resnet(num_labels=1), numbers, processor=processor)
    assert set(found.scores) == {"mse", "mae"} and found.confusion is None


def test_an_ensemble_is_predicted_as_one(files, tmp_path):
    members = [tiny_resnet(**NAMES, seed=seed) for seed in (0, 1)]
    CollaborativeModel.from_members(members, prediction="mean_probability").save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(files / "resnet").save_pretrained(tmp_path)
    found = np.stack([one.outputs for one in predict(tmp_path, files / "photos")])
    photos = sorted((files / "photos").rglob("*.png"))
    for index in (0, 1):
        AutoImageProcessor.from_pretrained(files / "resnet").save_pretrained(tmp_path / f"member_{index}")
    wanted = [alone(tmp_path / f"member_{index}", photos) for index in (0, 1)]
    np.testing.assert_allclose(found, sum(wanted) / 2, atol=1e-6)


def test_what_is_not_a_trained_classifier_is_refused(files, tmp_path):
    model = tiny_resnet(**NAMES)
    model.base_model.save_pretrained(tmp_path / "bare")
    shutil.copy(files / "resnet" / "preprocessor_config.json", tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no weights for classifier.*is only pretrained.*hf-ft train"):
        load_trained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(OptionError, match="has no image processor that can be read"):
        load_trained(tmp_path / "alone")
    torch.save(model.state_dict(), tmp_path / "alone" / "pytorch_model.bin")
    (tmp_path / "alone" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        load_trained(tmp_path / "alone")


def test_classes_that_the_model_does_not_know_are_refused(files, tmp_path):
    shutil.copytree(files / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "eel").rename(tmp_path / "photos" / "Eel")
    with pytest.raises(DataError, match=r"'Eel' \(4 rows; did you mean 'eel'\?\). It knows cat, dog, eel"):
        evaluate(files / "resnet", tmp_path / "photos")
    assert {one.label for one in predict(files / "resnet", tmp_path / "photos")} == {None}
    with pytest.raises(OptionError, match="tta mirrors images"):
        predict(files / "bert", files / "reviews.csv", reading=Reading(text_column="body"), tta=True)
