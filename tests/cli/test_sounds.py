"""``hf-ft`` on a folder of sounds: train, compare and advise; the model is saved with its feature extractor."""

import json

import pytest
from transformers import Wav2Vec2FeatureExtractor
from transformers import pipeline as make_pipeline

from hf_ft.cli import main
from hf_ft.testing.families import tiny
from tests.made_sounds import PITCHES, RATE, sounds, tone

pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    sounds(root / "sounds")
    still = {name: 0.0 for name in ("layerdrop", "mask_time_prob", "hidden_dropout", "attention_dropout")}
    model = tiny("Wav2Vec2ForSequenceClassification", num_hidden_layers=4, **still)
    model.base_model.save_pretrained(root / "wav2vec2")  # as pretrained on sounds without labels: it has no head
    Wav2Vec2FeatureExtractor(sampling_rate=RATE).save_pretrained(root / "wav2vec2")
    return root


def call(command, files, folder, *more):
    where = ["--model", str(files / "wav2vec2"), "--dataset", str(files / "sounds"), "--output_dir", str(folder)]
    return main([command, *where, "--use_cpu", "true", *more])


@pytest.mark.slow
def test_a_trained_model_tells_the_sounds_apart_and_is_saved_with_its_extractor(files, tmp_path, capsys):
    fast = ["--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--num_train_epochs", "3"]
    fast += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    assert call("train", files, tmp_path / "out", "--max_seconds", "0.2", *fast) == 0
    assert 'pipeline("audio-classification"' in capsys.readouterr().out
    classify = make_pipeline("audio-classification", model=str(tmp_path / "out"))
    assert classify.feature_extractor.sampling_rate == RATE
    for name, pitch in PITCHES.items():
        assert classify({"raw": tone(pitch, seed=99), "sampling_rate": RATE})[0]["label"] == name


@pytest.mark.slow
def test_strategies_are_compared_and_one_is_recommended(files, tmp_path, capsys):
    short = ["--strategies", "full,l2_sp", "--trials", "0", "--seeds", "1", "--num_train_epochs", "1"]
    assert call("compare", files, tmp_path / "out", *short) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["data"]["task"] == "audio" and len(results["contenders"]) == 2
    assert (tmp_path / "out" / "best" / "preprocessor_config.json").is_file()
    where = ["--model", str(files / "wav2vec2"), "--dataset", str(files / "sounds")]
    assert main(["advise", *where]) == 0
    assert "full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--image_size", "32"], "--image_size 32 has no effect"),
        (["--augment", "basic"], "these data are audio: use none"),
        (["--max_seconds", "0"], "--max_seconds 0 is not a length"),
    ],
)
def test_flags_for_other_data_are_refused(flags, told, files, tmp_path, capsys):
    assert call("train", files, tmp_path / "out", *flags) == 2
    assert told in " ".join(capsys.readouterr().err.split())
