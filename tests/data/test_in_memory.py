"""Samples kept in memory equal those of the dataset, bit for bit, and train a model to the same weights."""

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from transformers import MobileNetV2ImageProcessorPil, default_data_collator

from hf_ft import FTTrainer
from hf_ft.data import in_memory as held
from hf_ft.data.columns import find_columns
from hf_ft.data.in_memory import Held, estimated_bytes
from hf_ft.data.labels import class_labels
from hf_ft.data.prepare import prepare
from hf_ft.data.source_labels import class_names
from hf_ft.models.ensemble.processor import combined
from hf_ft.testing import models
from hf_ft.testing.training import tiny_arguments, tiny_data

SIZE = 32
ORDERS = ([0, 1, 2], [17, 3, 3, 0, 11], [], list(range(19, -1, -1)))


@pytest.fixture(autouse=True)
def offline_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def processor(size=SIZE, mean=0.5):
    return MobileNetV2ImageProcessorPil(
        size={"height": size, "width": size}, do_center_crop=False, image_mean=[mean] * 3
    )


def photos(count=20, names=("a", "b", "c")):
    rng = np.random.default_rng(0)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names)))
    images = [rng.integers(0, 255, (20, 24), dtype=np.uint8) for _ in range(count)]
    labels = [row % len(names) for row in range(count)]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def ready(processor, augment="none", **options):
    splits = datasets.DatasetDict(train=photos(**options))
    return prepare(splits, processor, find_columns(splits), augment)["train"]


def texts():
    lengths = [row % 5 + 1 for row in range(20)]
    return datasets.Dataset.from_dict(
        {"input_ids": [list(range(length)) for length in lengths], "labels": [length % 2 for length in lengths]}
    )


def same(one, other):
    """Equal in keys, types, dtypes and bits."""
    assert list(one) == list(other)
    for name, value in one.items():
        assert type(value) is type(other[name])
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype and torch.equal(value, other[name])
        else:
            assert value == other[name]


class Counting(torch.utils.data.Dataset):
    """Counts how often a sample is read."""

    def __init__(self, rows):
        self.rows, self.reads = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        self.reads += 1
        return self.rows[row]


@pytest.mark.parametrize(
    "make", [lambda: ready(processor()), lambda: ready(combined([processor(), processor(24, 0.3)])), texts]
)
def test_samples_are_those_of_the_data_set_in_any_order(make):
    dataset = make()
    kept = Held(dataset)
    assert len(kept) == len(dataset)
    for order in ORDERS:
        for found, row in zip(kept.__getitems__(order), order, strict=True):
            same(found, dataset[row])
            same(kept[row], dataset[row])
    same(kept[-1], dataset[len(dataset) - 1])
    with pytest.raises(IndexError, match="sample 20 of 20"):
        kept[20]


def test_every_sample_is_read_once():
    rows = [{"x": torch.tensor([float(row)]), "labels": row % 2} for row in range(150)]
    dataset = Counting(rows)
    kept = Held(dataset)
    assert dataset.reads == 150 and isinstance(kept.columns["x"], torch.Tensor)
    assert [kept[row]["x"].item() for row in (0, 149, 63, 64)] == [0, 149, 63, 64] and dataset.reads == 150


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8, torch.bool])
def test_types_are_kept(dtype):
    rows = [{"x": torch.tensor([row, 1 - row]).to(dtype), "labels": torch.tensor(row)} for row in range(2)]
    kept = Held(rows)
    for row in range(2):
        same(kept[row], rows[row])


def test_samples_of_different_shapes_are_kept_as_a_list():
    rows = [{"x": torch.arange(8.0 if row < 70 else 9.0), "labels": row % 2} for row in range(75)]
    kept = Held(rows)
    assert isinstance(kept.columns["x"], list) and len(kept.columns["x"]) == 75
    for row in (0, 5, 69, 70, 74):
        same(kept[row], rows[row])


def test_what_is_done_to_a_sample_does_not_stay():
    for dataset in (ready(processor()), texts()):
        kept = Held(dataset)
        for row in (kept[3], *kept.__getitems__([3])):
            for value in row.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
                elif isinstance(value, list):
                    value.clear()
            row.pop("labels")
        same(kept[3], dataset[3])


def test_labels_and_class_names_are_found_as_in_the_data_set():
    dataset = ready(processor())
    kept = Held(dataset)
    np.testing.assert_array_equal(kept.class_labels, class_labels(dataset))
    assert class_names(kept) == ("a", "b", "c")
    tensors = Held([{"labels": torch.tensor(row)} for row in (2, 0)])
    assert tensors.class_labels.tolist() == [2, 0]
    assert Held([{"labels": 0.5}, {"labels": 1.5}]).class_labels is None
    assert Held([{"labels": [0.0, 1.0]}, {"labels": [1.0]}]).class_labels is None
    assert Held([{"x": torch.ones(1)}]).class_labels is None
    for whole in (dataset, kept):
        part = Subset(Subset(whole, [4, 2, 0, 1]), [0, 3])
        np.testing.assert_array_equal(class_labels(part), class_labels(dataset)[[4, 1]])
    assert class_labels(Subset([{"labels": 0}], [0])) is None


def test_wrong_samples_are_named():
    with pytest.raises(ValueError, match="sample 1 is a tuple, not a dictionary"):
        Held([{"x": 1}, (1, 2)])
    with pytest.raises(ValueError, match=r"sample 1 has the keys \['x', 'y'\], but the first has \['x'\]"):
        Held([{"x": 1}, {"x": 1, "y": 2}])
    assert len(Held([])) == 0 and len(held.held([])) == 0


def test_augmented_samples_are_refused():
    with pytest.raises(ValueError, match="differ each time they are read.*augment='none'"):
        held.held(ready(processor(), augment="basic"))


def test_what_does_not_fit_stays_as_it_is(caplog, monkeypatch):
    monkeypatch.setattr(held.logger, "propagate", True)
    dataset = ready(processor())
    needed = 20 * (3 * SIZE * SIZE * 4)
    assert needed <= estimated_bytes(dataset) < needed * 1.01
    assert held.held(dataset, needed / 2**30 * 0.9) is dataset
    assert "20 samples would take 0.00 GB of memory, more than limit_gb=" in caplog.text
    assert isinstance(held.held(dataset, needed / 2**30 * 1.1), Held)
    with pytest.raises(ValueError, match="limit_gb=-1"):
        held.held(dataset, -1)
    reads = Counting([dataset[row] for row in range(20)])
    held.held(reads, 0)
    assert reads.reads == 3 * 8  # a few samples suffice to see it


def test_a_data_loader_with_workers_reads_the_same():
    dataset = ready(processor())
    batches = [
        list(DataLoader(rows, 8, collate_fn=default_data_collator, num_workers=workers))
        for rows, workers in ((dataset, 0), (Held(dataset), 0), (Held(dataset), 2))
    ]
    for plain, here, there in zip(*batches, strict=True):
        same(plain, here)
        same(plain, there)


def weights(rows, folder, make=models.tiny_resnet, strategy="full", **arguments):
    model = make(num_labels=3)
    args = tiny_arguments(folder, remove_unused_columns=False, lr_scheduler_type="constant", **arguments)
    trainer = FTTrainer(model, args, strategy=strategy, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return trainer.evaluate()["eval_loss"], trainer.model.state_dict()


@pytest.mark.parametrize(
    ("strategy", "arguments"),
    [
        ("full", {}),
        ("linear_probe", {"max_steps": 24}),  # starts from recorded features
        ("lp_ft", {"max_steps": 24}),
        ("full", {"dataloader_num_workers": 1}),
    ],
)
def test_training_ends_with_the_same_weights(tmp_path, strategy, arguments):
    dataset = ready(processor())
    loss, plain = weights(dataset, tmp_path / "plain", strategy=strategy, **arguments)
    reads = Counting(Held(dataset))
    for rows in (held.held(dataset), reads):
        other_loss, other = weights(rows, tmp_path / "held", strategy=strategy, **arguments)
        assert other_loss == loss
        same(other, plain)
    if "max_steps" in arguments:
        assert reads.reads < arguments["max_steps"] * 8  # the frozen part was computed once per sample


def test_columns_that_the_model_does_not_take_are_dropped(tmp_path):
    dataset = tiny_data(models.tiny_bert(num_labels=3))
    more = dataset.add_column("title", ["x"] * len(dataset)).with_format("torch")
    found = []
    for rows in (dataset, Held(dataset), more, Held(more)):
        trainer = FTTrainer(models.tiny_bert(num_labels=3), tiny_arguments(tmp_path), train_dataset=rows)
        trainer.train()
        found.append(trainer.model.state_dict())
    for other in found[1:]:
        same(other, found[0])
