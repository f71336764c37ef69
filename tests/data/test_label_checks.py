"""Invalid labels are refused before the first step, naming the dataset, column, row, value and fix."""

import datasets
import pytest
import torch
import transformers as hf
from torch import nn

from hf_ft import FTTrainer, OptionError
from hf_ft.testing import same_tensors, tiny_bert, tiny_data, tiny_vit
from hf_ft.testing.training import snapshot, tiny_arguments


def images(labels, count=None):
    data = tiny_data(tiny_vit(), count or len(labels)).remove_columns("labels")
    return data.with_format(None).add_column("labels", labels).with_format("torch")


def trainer(data, folder, model=None, evaluated=None, **arguments):
    args = tiny_arguments(folder, **arguments)
    return FTTrainer(model or tiny_vit(), args, train_dataset=data, eval_dataset=evaluated)


MULTI = {"problem_type": "multi_label_classification"}
REGRESSION = {"num_labels": 1}
REFUSED = [
    ([0, 1, None, 2], {}, "train_dataset: labels None of row 2 is missing"),
    ([0.0, 1.0, 2.0, 1.0], {}, r"labels 0\.0 of row 0 is not an integer: cast"),
    (["cat", "dog", "cat", "dog"], {}, r"labels 'cat' of row 0 is text: map the class names to the numbers 0\.\.2"),
    ([0, 1, 2, 3], {}, r"labels 3 of row 3 lies outside \[0, 3\)"),
    ([0, 1, 2, -1], {}, r"labels -1 of row 3 lies outside \[0, 3\)"),
    ([[0, 1, 0], [1, 0, 0]] * 2, {}, r"labels \[0, 1, 0\] of row 0 is a vector: set model.config.problem_type"),
    ([[0.0, 1.0], [1.0, 0.0]] * 2, MULTI, "has 2 values, but the model's num_labels is 3"),
    ([[0, 1, 0], [2, 0, 0]] * 2, MULTI, r"labels \[2, 0, 0\] of row 1 has values outside \[0, 1\]"),
    ([0, 1, 2, 1], MULTI, "is a single value, but the model's problem_type"),
    ([0.5, float("nan"), 1.0, 2.0], REGRESSION, "labels nan of row 1 is not a finite number"),
]


@pytest.mark.parametrize(("labels", "config", "message"), REFUSED)
def test_refused_before_training(labels, config, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        trainer(images(labels), tmp_path / "out", tiny_vit(**config))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["eval_dataset", r"eval_dataset\['far'\]"])
def test_evaluation_data_are_checked_too(name, tmp_path):
    bad = images([0, 1, 5, 2])
    with pytest.raises(OptionError, match=rf"{name}: labels 5 of row 2 lies outside"):
        trainer(images([0, 1, 2, 1]), tmp_path, evaluated=bad if "far" not in name else {"far": bad})


def test_data_read_row_by_row(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, row):
            return {"pixel_values": torch.zeros(3, 32, 32), "labels": 7}

    with pytest.raises(OptionError, match="train_dataset: labels 7 of row . lies outside"):
        trainer(Rows(), tmp_path)


def test_what_a_transform_makes_of_raw_labels_counts(tmp_path):
    """The column is text, and the transform maps it to classes."""
    raw = datasets.Dataset.from_dict({"label": ["cat", "dog"] * 4})

    def transform(rows):
        return {
            "pixel_values": [torch.zeros(3, 32, 32)] * len(rows["label"]),
            "labels": [int(x == "dog") for x in rows["label"]],
        }

    trainer(raw.with_transform(transform), tmp_path, remove_unused_columns=False, max_steps=1).train()


def trained(data, folder, model=None, **arguments):
    run = trainer(data, folder, model, max_steps=3, **arguments)
    run.train()
    return run


def test_booleans_are_classes(tmp_path):
    truth = [True, False] * 8
    one = trained(images(truth), tmp_path / "bool")
    other = trained(images([int(x) for x in truth]), tmp_path / "int")
    same_tensors(snapshot(one.model), snapshot(other.model))


def test_booleans_under_a_padding_collator(tmp_path):
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=_words(), pad_token="[PAD]")
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]] * 4, "labels": [True, False] * 4})
    run = FTTrainer(
        tiny_bert(num_labels=2), tiny_arguments(tmp_path, max_steps=2), train_dataset=data, processing_class=tokenizer
    )
    run.train()
    assert run.model.config.problem_type == "single_label_classification"


def test_integer_vectors_are_several_labels_where_the_config_says_so(tmp_path):
    vectors = [[0, 1, 1], [1, 0, 0]] * 8
    one = trained(images(vectors), tmp_path / "int", tiny_vit(**MULTI))
    other = trained(images([[float(x) for x in v] for v in vectors]), tmp_path / "float", tiny_vit(**MULTI))
    same_tensors(snapshot(one.model), snapshot(other.model))


def test_integer_targets_of_a_regression(tmp_path):
    one = trained(images([1, 2, 3, 4] * 4), tmp_path / "int", tiny_vit(**REGRESSION))
    other = trained(images([1.0, 2.0, 3.0, 4.0] * 4), tmp_path / "float", tiny_vit(**REGRESSION))
    same_tensors(snapshot(one.model), snapshot(other.model))


def test_the_problem_type_is_known_before_the_first_batch(tmp_path):
    """Otherwise class weights turn several labels per sample into one."""
    vectors = [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]] * 8
    with pytest.raises(OptionError, match="class_weights need single-label classification"):
        FTTrainer(tiny_vit(), tiny_arguments(tmp_path), train_dataset=images(vectors), class_weights=[1.0, 1.0, 1.0])
    assert trainer(images(vectors), tmp_path).model.config.problem_type == "multi_label_classification"
    assert trainer(images([0.5] * 4), tmp_path, tiny_vit(**REGRESSION)).model.config.problem_type == "regression"
    assert trainer(images([0, 1, 2, 1]), tmp_path).model.config.problem_type == "single_label_classification"


def test_a_model_without_a_config_is_left_alone(tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x, labels=None):
            return {"loss": nn.functional.mse_loss(self.last(x), labels), "logits": self.last(x)}

    data = datasets.Dataset.from_dict({"x": [[0.0, 1.0, 2.0]] * 8, "labels": [[0.5, 1.5]] * 8}).with_format("torch")
    trained(data, tmp_path, Bare())


def _words():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "c": 3}, "[PAD]"))
