"""Two gloo ranks give what one process gives, for every strategy. One pair of processes runs them all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_ft.testing import same_tensors

KINDS = ("batch", "pooled")
WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    root = str(WORKER.parents[2])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, ranks in (([sys.executable], 1), (torchrun, 2)):
        done = subprocess.run([*launcher, WORKER, folder, str(ranks)], capture_output=True, text=True, env=env)
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
    """Each sample counts once, in the same batches: what BatchNorm sees agrees to the last digits of float32."""
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
