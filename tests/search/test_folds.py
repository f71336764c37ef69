"""Folds hold out every sample once, and a context on one fold sees only the others."""

import dataclasses

import numpy as np
import pytest
import torch

from hf_ft import OptionError
from hf_ft.search.folds import context_on, folds_of
from hf_ft.testing import tiny_resnet
from hf_ft.testing.training import make_trainer


def test_every_sample_but_single_ones_is_held_out_once():
    labels = np.array([0] * 20 + [1] * 10 + [2])
    folds = folds_of(31, labels, 5)
    held_out = [row for fold in folds for row in fold.held_out]
    assert sorted(held_out) == list(range(30)), "the only sample of class 2 always trains"
    for fold in folds:
        assert sorted(fold.train + fold.held_out) == list(range(31))
        assert np.bincount(labels[list(fold.held_out)]).tolist() == [4, 2]
    assert folds_of(31, labels, 5) == folds
    with pytest.raises(OptionError, match="2 training samples.* too few for 5 folds"):
        folds_of(3, np.array([0, 0, 1]), 5)


def test_a_context_on_rows_sees_them_once_on_any_number_of_ranks(tmp_path):
    trainer = make_trainer(tiny_resnet(), "full", tmp_path, per_device_train_batch_size=4)
    whole, rows = trainer.context(), [3, 1, 7, 20, 21, 30]
    found = []
    for ranks in (1, 2):
        parts = [context_on(dataclasses.replace(whole, rank=rank, ranks=ranks), rows) for rank in range(ranks)]
        found.append(torch.cat([batch["labels"] for part in parts for batch in part.batches()]).sort().values)
    expected = whole.samples.read(rows)["labels"]
    assert torch.equal(found[0], expected.sort().values) and torch.equal(found[1], found[0])
    part = context_on(whole, rows)
    assert torch.equal(part.samples.read([0, 3])["labels"], expected[[0, 3]]) and part.samples.count == 6
    assert part.labels.tolist() == expected.tolist() and part.folder is None
    assert part.generator.initial_seed() == whole.generator.initial_seed()
