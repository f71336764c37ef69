"""Several tokenizers as one: every tensor is that of its part, files restore it, and errors name the cause."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import Dataset

from hf_ft.errors import CheckpointError, OptionError
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.models.ensemble.processor import CollaborativeTokenizer, column, combined, distinct
from hf_ft.testing.models import tiny_bert
from hf_ft.testing.training import tiny_arguments
from hf_ft.trainer.trainer import FTTrainer
from tests.models.ensemble.hub_uploads import uploads

TEXTS = ["good film", "bad", "good bad film film"]


def tokenizer(folder, *words, **options):
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, ""]))
    return hf.BertTokenizerFast(vocab=str(folder / "vocab.txt"), **options)


@pytest.fixture
def words(tmp_path):
    return tokenizer(tmp_path / "words", "good", "bad", "film", model_max_length=20)


@pytest.fixture
def pieces(tmp_path):
    return tokenizer(tmp_path / "pieces", "film", "go", "##od", "##d", "b", "##a", model_max_length=12)


def test_distinct_by_vocabulary_and_settings(words, pieces, tmp_path):
    words.save_pretrained(tmp_path / "saved")
    used = hf.AutoTokenizer.from_pretrained(tmp_path / "saved")
    used(TEXTS, padding=True, truncation=True, max_length=3)  # leaves its options in the tokenizer
    left = copy.deepcopy(words)
    left.padding_side = "left"
    assert distinct([words, pieces, used, left, pieces])[1] == [0, 1, 0, 2, 1]
    assert combined([words, used]) is words


def test_each_part_tokenises(words, pieces):
    both = combined([words, pieces, words])
    pairs = {"text_pair": TEXTS[::-1], "truncation": True, "max_length": 6, "padding": True, "return_tensors": "pt"}
    for texts, options in ((TEXTS, pairs), (TEXTS, {}), ("bad film", {"return_tensors": "pt"})):
        found, first, second = both(texts, **options), words(texts, **options), pieces(texts, **options)
        assert list(found) == both.model_input_names == [*first, *(f"{name}_1" for name in second)]
        for index, part in enumerate((first, second)):
            for name, value in part.items():
                assert (
                    torch.equal(found[column(name, index)], value) if options else found[column(name, index)] == value
                )
    assert both.model_max_length == 12 and both.pad_token_id == 0 and both.padding_side == "right"


def test_each_part_pads_by_its_own_tokenizer(words, tmp_path):
    other = tokenizer(tmp_path / "other", "film", "bad", pad_token="film", padding_side="left")
    both = CollaborativeTokenizer([words, other])
    rows = [dict(both(text)) | {"labels": label} for text, label in zip(TEXTS, (2, 0, 1), strict=True)]
    padded = both.pad(rows, return_tensors="pt")
    first, second = (part(TEXTS, padding=True, return_tensors="pt") for part in (words, other))
    wanted = {**first, "labels": torch.tensor([2, 0, 1]), **{f"{name}_1": tensor for name, tensor in second.items()}}
    assert list(padded) == list(wanted) and all(torch.equal(padded[name], wanted[name]) for name in wanted)
    assert padded["input_ids_1"][1].tolist() == [5, 5, 5, 2, 6, 3]  # its own side and token
    columns = both.pad({name: [row[name] for row in rows] for name in rows[0]}, return_tensors="pt")
    assert all(torch.equal(columns[name], wanted[name]) for name in wanted)
    with pytest.raises(OptionError, match="no .input_ids_1.: .*remove_unused_columns=False"):
        both.pad([{"input_ids": [2, 3], "labels": 0}])
    with pytest.raises(OptionError, match=r"these pad on \['right', 'left'\] and with \[5\]\. Use batch_size=1"):
        _ = both.padding_side


def test_tokenizer_files_restore_it(words, pieces, tmp_path, monkeypatch):
    both = combined([words, pieces])
    files = both.save_pretrained(tmp_path / "saved")
    assert {Path(file) for file in files} == {path for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "hf_ft_collaborative"}')
    back = CollaborativeTokenizer.from_pretrained(tmp_path / "saved")
    assert dict(back(TEXTS)) == dict(both(TEXTS)) and back.model_max_length == 12
    assert distinct([words, pieces, *back.tokenizers])[1] == [0, 1, 0, 1]
    files = uploads(monkeypatch)
    both.push_to_hub("someone/films")
    parts = [f"tokenizer_{n}/{file}" for n in (0, 1) for file in ("tokenizer.json", "tokenizer_config.json")]
    assert files == sorted(["README.md", "collaborative_tokenizer.json", *parts])


@pytest.mark.parametrize("name", ["collaborative_tokenizer.json", "tokenizer_1/tokenizer.json", "tokenizer_1"])
def test_damaged_tokenizer_files_are_named(words, pieces, tmp_path, name):
    combined([words, pieces]).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_text('{"tokenizers": ')
        with pytest.raises(CheckpointError, match=f"{Path(name).parts[0]} is missing or damaged .*Restore it"):
            CollaborativeTokenizer.from_pretrained(tmp_path / "saved")
        path.unlink()
    with pytest.raises(CheckpointError, match=f"{name}.* is missing or damaged .*Restore it"):
        CollaborativeTokenizer.from_pretrained(tmp_path / "saved")


def test_text_pipeline_takes_the_object(words, pieces):
    model = CollaborativeModel.from_members([tiny_bert(), tiny_bert(seed=1)], inputs=[0, 1])
    both = combined([words, pieces])
    with torch.no_grad():
        wanted = model(**both(TEXTS, padding=True, return_tensors="pt")).logits.softmax(-1)
    classify = hf.pipeline("text-classification", model=model, tokenizer=both, top_k=None)
    for answers in (classify(TEXTS), classify(TEXTS, batch_size=2)):
        for answer, scores in zip(answers, wanted, strict=True):
            found = {entry["label"]: entry["score"] for entry in answer}
            ordered = [found[model.config.id2label[label]] for label in range(len(scores))]
            assert ordered == pytest.approx(scores.tolist(), abs=1e-6)


def test_what_cannot_be_combined_is_named(words):
    for make in (distinct, combined):
        with pytest.raises(OptionError, match=r"processors\[1\] is None: member 1 has no image processor or tokenizer"):
            make([words, None])
        with pytest.raises(OptionError, match=r"processors=\[\] is empty"):
            make([])
        with pytest.raises(OptionError, match=r"processors\[0\] is a str: give a plain BaseImageProcessor or PreTrai"):
            make(["words", words])
    with pytest.raises(OptionError, match=r"processors\[0\] is a CollaborativeTokenizer: give a plain"):
        CollaborativeTokenizer([CollaborativeTokenizer([words])])


@pytest.mark.slow
def test_a_trainer_pads_with_it(words, pieces, tmp_path):
    """Without a custom collator, as the Trainer does for a single tokenizer."""
    model = CollaborativeModel.from_members([tiny_bert(), tiny_bert(seed=1)], inputs=[0, 1])
    both = CollaborativeTokenizer([words, pieces])
    rows = [{**both(text), "labels": number % 2} for number, text in enumerate(["good film", "bad"] * 4)]
    args = tiny_arguments(tmp_path, max_steps=2, per_device_train_batch_size=4)
    data = Dataset.from_list([dict(row) for row in rows])
    trainer = FTTrainer(model, args, strategy="full", train_dataset=data, processing_class=both)
    trainer.train()
    assert trainer.state.global_step == 2, "and none of the numbered columns was dropped"
    trainer.save_model(tmp_path / "saved")
    for index, own in enumerate((words, pieces)):  # each member can be used without the others
        alone = hf.AutoTokenizer.from_pretrained(tmp_path / "saved" / f"member_{index}")
        assert alone("good film")["input_ids"] == own("good film")["input_ids"]
