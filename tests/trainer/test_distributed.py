"""Two gloo ranks give the same as one process, for every strategy. One pair of processes runs them all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_ft.testing import same_tensors
from tests.forked import python

KINDS = ("batch", "pooled")
WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        done = python(WORKER, folder, ranks, ranks=ranks)
        assert done.returncode == 0, done.stderr[-4000:]
    return {
        ranks: (
            load_file(folder / f"weights-{ranks}.safetensors"),
            json.loads((folder / f"logs-{ranks}.json").read_text()),
        )
        for ranks in (1, 2)
    }


@pytest.mark.slow
def test_two_ranks_train_the_same_weights(results):
    same_tensors(results[1][0], results[2][0], 5e-6)


@pytest.mark.slow
def test_two_ranks_measure_the_same(results):
    """Each sample counts once, in the same batches: BatchNorm's inputs agree up to float32 rounding."""
    one, two = ({k: v for k, v in results[n][0].items() if k.startswith("moments/")} for n in (1, 2))
    assert len(one) == 4 * 16
    same_tensors(one, two, 1e-6)
    within, pooled = (one[f"moments/{kind}-500/resnet.embedder.embedder.normalization.var"] for kind in KINDS)
    assert not torch.allclose(within, pooled, rtol=1e-4)


@pytest.mark.slow
def test_two_ranks_log_the_same(results):
    one, two = results[1][1], results[2][1]
    assert set(one) == set(two) and len(one) > 12
    for label in one:
        assert len(one[label]) == len(two[label]) == 8
        for first, second in zip(one[label], two[label], strict=True):
            assert first == pytest.approx(second, rel=1e-4, abs=1e-6), label
