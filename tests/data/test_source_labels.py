"""Labels of source data must be the source head's, or be mapped to them."""

import datasets
import pytest
import torch

from hf_ft import FTTrainer, OptionError, SoftConfig
from hf_ft.data.source_labels import SourceLabels, class_names, head_names
from hf_ft.testing import tiny_data, tiny_resnet
from hf_ft.testing.training import equipped, tiny_arguments

PETS = ("cat", "dog", "owl")


def data(labels, names=None, column="labels"):
    feature = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    return datasets.Dataset.from_dict({column: labels}, features=datasets.Features({column: feature}))


def mapped(prepare, labels):
    return prepare({"labels": torch.tensor(labels), "pixel_values": None})["labels"].tolist()


def test_numbers_and_equal_names_are_kept():
    for labels in (data([0, 2]), data([0, 2], PETS), [{"labels": 1}]):
        assert mapped(SourceLabels(3, PETS)(labels), [2, 0, 1]) == [2, 0, 1]
    assert mapped(SourceLabels(3)(data([0, 1], ("a", "b", "c"))), [2]) == [2]  # the head's classes have no names


def test_another_order_is_refused_and_mapped_by_name():
    other = data([0, 1, 2], ("owl", "cat", "dog"))
    with pytest.raises(OptionError, match=r"\['owl', 'cat', 'dog'\].*\['cat', 'dog', 'owl'\].*order.*'by_name'"):
        SourceLabels(3, PETS)(other)
    assert mapped(SourceLabels(3, PETS, "by_name")(other), [0, 1, 2]) == [2, 0, 1]


def test_a_part_of_the_classes_is_mapped_by_name():
    part = data([0, 1], ("owl", "cat"))
    with pytest.raises(OptionError, match="only some of them.*'by_name'"):
        SourceLabels(3, PETS)(part)
    assert mapped(SourceLabels(3, PETS, "by_name")(part), [0, 1]) == [2, 0]


def test_other_names_are_refused_with_an_example():
    with pytest.raises(OptionError, match=r"source_label_map=\{'n01': 'cat', ...\}.*'by_number'"):
        SourceLabels(3, PETS)(data([0, 1], ("n01", "n02")))
    assert mapped(SourceLabels(3, PETS, "by_number")(data([0], ("n01", "n02"))), [1]) == [1]


def test_dictionaries_of_names_and_numbers():
    given = data([0, 1], ("n01", "n02"))
    assert mapped(SourceLabels(3, PETS, {"n01": "owl", "n02": 0})(given), [0, 1]) == [2, 0]
    assert mapped(SourceLabels(3, (), {"5": 1, "7": "2"})(data([5, 7])), [7, 5]) == [2, 1]


@pytest.mark.parametrize(
    ("labels", "label_map", "message"),
    [
        (data([0, 3]), None, r"label 3 lies outside \[0, 3\).*source_label_map="),
        (data([-1]), None, "label -1 lies outside"),
        (data([0, 1], ("a", "b")), {"a": 0}, "has no entry for label 1"),
        (data([0], ("a", "b")), {"c": 0}, r"no class 'c'; its classes are \['a', 'b'\]"),
        (data([0]), {"c": 0}, "no class 'c'; it does not name its classes: use numbers"),
        (data([0]), {"0": 3}, r"'0' -> 3 is not a class of the source head: use a number in \[0, 3\)"),
        (data([0]), {"0": "cow"}, "'0' -> 'cow' is not a class"),
        (data([0], ("0", "1")), "by_name", r"by_name': the source head has no class '0', only \['cat'"),
        (data([0]), {}, "source_label_map={} is empty"),
        (data([0]), "by_name", "source_dataset does not name its classes"),
    ],
)
def test_what_does_not_fit_is_named(labels, label_map, message):
    with pytest.raises(OptionError, match=message):
        SourceLabels(3, PETS, label_map)(labels)


def test_labels_that_cannot_be_read_beforehand_are_checked_in_each_batch():
    prepare = SourceLabels(3)([{"labels": 0}])
    with pytest.raises(OptionError, match="label 4 lies outside"):
        mapped(prepare, [0, 4])
    prepare = SourceLabels(3, (), {"1": 2})([{"labels": 1}])
    with pytest.raises(OptionError, match="has no entry for label 0"):
        mapped(prepare, [1, 0])
    with pytest.raises(OptionError, match="without 'labels'"):
        prepare({"pixel_values": None})


def test_names():
    assert class_names(data([0], PETS)) == PETS
    assert class_names(data([0], PETS).to_iterable_dataset()) == PETS
    assert class_names(data([0])) == class_names([1]) == ()
    assert head_names({1: "b", 0: "a"}) == ("a", "b")
    assert head_names({0: "LABEL_0", 1: "LABEL_1"}) == ()


def test_refused_when_the_trainer_is_made(tmp_path):
    config = SoftConfig()
    model = equipped(tiny_resnet(num_labels=7), config)  # labels up to 6; the source head has five classes
    given = {"train_dataset": tiny_data(model, 32), "source_dataset": tiny_data(model, 64, seed=2)}
    with pytest.raises(OptionError, match=r"lies outside \[0, 5\), the source head's classes"):
        FTTrainer(model, tiny_arguments(tmp_path), strategy=config, **given)
    fold = SoftConfig(source_label_map={i: i % 5 for i in range(7)})
    FTTrainer(model, tiny_arguments(tmp_path), strategy=fold, **given).train()


def test_a_map_survives_saving(tmp_path):
    config = SoftConfig(source_label_map={0: "cat", "dog": 1})
    config.save_pretrained(tmp_path)
    assert SoftConfig.from_pretrained(tmp_path) == config
    assert config.source_label_map == {"0": "cat", "dog": 1}
