"""Text models as found on the Hub: no padding token, or meaningless maximum lengths; numbers read as text."""

import datasets
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_ft.cli import main
from hf_ft.data.classifier import load_classifier
from hf_ft.data.columns import find_columns
from hf_ft.data.load import load_splits
from hf_ft.data.prepare import collate, prepare, usual_length
from hf_ft.data.task import Data
from hf_ft.errors import DataError, OptionError
from hf_ft.testing.models import tiny_bert

WORDS = ["[UNK]", "<end>", "good", "bad", "film", "7", "8"]


def tokenizer(**special):
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "reviews.csv"
    file.write_text("text,label\n" + "good film,pos\nbad,neg\n" * 8)
    return str(file)


def gpt2(folder, **special):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": len(WORDS), "n_positions": 32}
    hf.GPT2ForSequenceClassification(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(folder)
    tokenizer(**special).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_texts_are_padded_with_the_end_token_where_there_is_no_other(reviews, tmp_path, capsys):
    model, out = gpt2(tmp_path / "gpt2", eos_token="<end>"), tmp_path / "out"
    flags = ["--max_steps", "2", "--use_cpu", "true", "--output_dir", str(out)]
    assert main(["train", "--model", model, "--dataset", reviews, *flags]) == 0
    assert "has no padding token: texts are padded with '<end>'" in capsys.readouterr().err
    assert hf.AutoTokenizer.from_pretrained(out).pad_token == "<end>"
    assert hf.AutoConfig.from_pretrained(out).pad_token_id == 1


def test_a_tokenizer_without_either_is_refused_before_training(reviews, tmp_path, capsys):
    model, out = gpt2(tmp_path / "gpt2"), tmp_path / "out"
    assert main(["train", "--model", model, "--dataset", reviews, "--output_dir", str(out)]) == 2
    assert "neither a padding nor an end-of-sequence token" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [None, -1, 5])
def test_a_decoder_reads_the_last_token_before_the_padding(wrong, tmp_path):
    """Whatever padding id its config gives: Llama's is -1."""
    folder = gpt2(tmp_path / "gpt2", eos_token="<end>")
    config = hf.AutoConfig.from_pretrained(folder)
    config.pad_token_id = wrong
    config.save_pretrained(folder)
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["good", "bad film"], "label": ["a", "b"]}))
    columns = find_columns(splits)
    model, words = load_classifier(folder, columns, seed=0)
    model.eval()
    rows = prepare(splits, words, columns)["train"]
    batch = collate(words)([rows[0], rows[1]])
    alone = collate(words)([rows[0]])
    torch.testing.assert_close(model(**batch).logits[0], model(**alone).logits[0])


def test_a_tokenizer_with_more_tokens_than_its_model_is_refused(tmp_path):
    folder = gpt2(tmp_path / "gpt2", eos_token="<end>")
    more = hf.AutoTokenizer.from_pretrained(folder)
    more.add_special_tokens({"pad_token": "<pad>"})
    more.save_pretrained(folder)
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["good", "bad"], "label": ["a", "b"]}))
    with pytest.raises(DataError, match="has 8 tokens, but its model only 7: .*resize_token_embeddings"):
        load_classifier(folder, find_columns(splits), seed=0)


@pytest.mark.parametrize(("positions", "longest", "expected"), [(-1, 10**30, 512), (0, 64, 64), (40, -1, 40)])
def test_meaningless_lengths(positions, longest, expected):
    model = tiny_bert(num_labels=2)
    model.config.max_position_embeddings = positions
    words = tokenizer(eos_token="<end>")
    words.model_max_length = longest
    assert usual_length(model, words) == expected


def test_numbers_are_read_as_text():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"age": [7, 8, 7], "label": ["a", "b", "a"]}))
    ready = prepare(splits, tokenizer(eos_token="<end>"), find_columns(splits, text_column="age"), max_length=4)
    assert ready["train"]["input_ids"][:] == [[5], [6], [5]]


def test_a_length_of_no_tokens_is_refused(reviews):
    splits = load_splits(reviews)
    with pytest.raises(OptionError, match="max_length=0 must be at least 1 token, or None."):
        Data(splits, find_columns(splits), max_length=0)
