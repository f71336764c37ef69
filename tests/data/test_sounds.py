"""Sounds: how they are opened, where they are found, and their batches for every kind of feature extractor."""

import numpy as np
import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, Features, Value
from transformers import (
    ASTFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from hf_ft.data import check_images, collate, find_columns, load_splits, open_sound, prepare
from hf_ft.errors import DataError
from hf_ft.testing.families import tiny
from tests.made_sounds import RATE, sounds, write

pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sounds(tmp_path_factory.mktemp("data") / "sounds")


def test_two_channels_of_another_rate_become_one_at_the_models_rate(tmp_path):
    """The mean of both channels, at a third of the rate, is the original tone."""
    times = np.arange(24000) / 48000
    left, right = 0.6 * np.sin(2 * np.pi * 440 * times), 0.2 * np.sin(2 * np.pi * 440 * times)
    write(tmp_path / "a.wav", np.stack([left, right], axis=1), rate=48000)
    found = open_sound(str(tmp_path / "a.wav"), row=0, rate=16000)
    wanted = 0.4 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    assert found.shape == (8000,) and found.dtype == np.float32
    assert np.abs(found - wanted)[100:-100].max() < 0.01  # the filter has fewer neighbours at the ends
    assert len(open_sound(str(tmp_path / "a.wav"), row=0, rate=16000, seconds=0.25)) == 4000
    bytes_of = {"path": None, "bytes": (tmp_path / "a.wav").read_bytes()}
    assert np.array_equal(open_sound(bytes_of, row=0, rate=16000), found)


@pytest.mark.parametrize(("content", "reason"), [(b"", "Format not recognised"), (None, "no such file")])
def test_what_cannot_be_read_is_named_with_its_row(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=rf"in row 7 \(.*a\.wav\): {reason}"):
        open_sound(str(tmp_path / "a.wav"), row=7, rate=RATE)


def splits_of(kind, folder, place):
    if kind == "folder":
        return load_splits(str(folder))
    files = sorted(folder.glob("*/*.wav"))
    if kind == "table":
        lines = [f"{file},{file.parent.name}" for file in files]
        (place / "table.csv").write_text("\n".join(["file,label", *lines]) + "\n")
        return load_splits(str(place / "table.csv"))
    label = ClassLabel(names=["high", "low"])
    features = Features(speech={"bytes": Value("binary"), "path": Value("string")}, label=label)
    rows = {
        "speech": [{"path": file.name, "bytes": file.read_bytes()} for file in files],
        "label": [file.parent.name for file in files],
    }
    Dataset.from_dict(rows, features=features).cast_column("speech", Audio()).save_to_disk(place / "saved")
    return load_splits(str(place / "saved"))


@pytest.mark.parametrize("kind", ["folder", "table", "saved"])
def test_sounds_are_found_and_labelled_by_folder_table_or_type(kind, folder, tmp_path):
    splits = splits_of(kind, folder, tmp_path)
    columns = find_columns(splits)
    assert columns.task == "audio" and columns.names == ("high", "low")
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "validation": 4}
    ready = prepare(splits, Wav2Vec2FeatureExtractor(sampling_rate=RATE), columns)
    for row in ready["train"]:
        loudest = np.argmax(np.abs(np.fft.rfft(row["input_values"]))) * RATE / len(row["input_values"])
        assert abs(loudest - {0: 1500, 1: 300}[row["labels"]]) < 10


EXTRACTORS = {
    "Wav2Vec2ForSequenceClassification": Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True),
    "ASTForAudioClassification": ASTFeatureExtractor(sampling_rate=16000, num_mel_bins=16, max_length=32),
    "WhisperForAudioClassification": WhisperFeatureExtractor(feature_size=16, hop_length=500, chunk_length=1),
    "Wav2Vec2BertForSequenceClassification": SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8),
}


@pytest.mark.parametrize("name", EXTRACTORS)
def test_batches_fit_the_model_and_do_not_change_a_sound(name, folder):
    extractor = EXTRACTORS[name]
    columns = find_columns(splits := load_splits(str(folder)))
    rows = prepare(splits, extractor, columns)["train"]
    batch = collate(extractor)([rows[place] for place in range(5)])
    assert tiny(name, num_labels=2)(**batch).logits.shape == (5, 2)
    assert batch["labels"].tolist() == [rows[place]["labels"] for place in range(5)]
    key = extractor.model_input_names[0]
    for place in range(5):
        alone = torch.as_tensor(rows[place][key])
        assert torch.equal(batch[key][place][: len(alone)], alone)


def test_unreadable_sounds_are_refused_or_left_out(tmp_path):
    broken = sounds(tmp_path / "sounds")
    (broken / "low" / "3.wav").write_bytes(b"RIFF")
    splits = load_splits(str(broken))
    columns = find_columns(splits)
    with pytest.raises(DataError, match=r"1 of 20 sounds cannot be read: .*3\.wav"):
        check_images(splits, columns)
    kept, _ = check_images(splits, columns, "skip")
    assert sum(map(len, kept.values())) == 19


def test_a_long_sound_is_truncated(folder):
    splits = load_splits(str(folder))
    ready = prepare(splits, Wav2Vec2FeatureExtractor(sampling_rate=RATE), find_columns(splits), seconds=0.1)
    assert {len(row["input_values"]) for row in ready["train"]} == {RATE // 10}
