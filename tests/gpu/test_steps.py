"""Without a GPU, a device that does not exist shows what would fail or wait on one.

`python -m tests.gpu.steps` takes the steps of all strategies.
"""

import pytest

from tests import forked

pytestmark = pytest.mark.newest  # of torch
FEW = ("delta",)  # with a reference network, and measured tensors
WRONG = """
import tempfile
from pathlib import Path
from unittest import mock

import torch

from hf_ft import L2SPConfig, Plan, Term
from hf_ft.testing import tiny_resnet
from tests.gpu.steps import described, take_steps

def on_the_host(weights):
    return weights * torch.ones(3)

def read(weights):
    return weights * weights.detach().sum().item()

def copied(weights):
    return weights * torch.ones(3).to(weights.device)

def chosen(weights):
    return weights[weights > 0]

for wrong in (on_the_host, read, copied, chosen, torch.abs):
    plan = Plan(terms=(Term("wrong", lambda view: wrong(view.weights(("",))[-1]).sum()),))
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(L2SPConfig, "plan", lambda *_: plan):
            take_steps(L2SPConfig(), tiny_resnet, Path(folder))
    except Exception as error:
        print(wrong.__name__, described(error))
"""


@pytest.mark.slow
def test_steps_stay_on_the_device():
    done = forked.python("-m", "tests.gpu.steps", *FEW)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_would_fail_or_wait_is_found():
    done = forked.python("-c", WRONG)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(found) == {"on_the_host", "read", "copied", "chosen"}, done.stdout
    for name, told in zip(found, ("same device", "_local_scalar_dense", "copy to the device", "nonzero"), strict=True):
        assert told in found[name]
