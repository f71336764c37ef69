"""LP-FT against a loop of two stages written by hand in float64."""

import copy

import pytest
import torch
from torch import nn

from hf_ft import LPFTConfig
from hf_ft.testing import same_tensors, tiny_data, tiny_resnet
from hf_ft.testing.training import make_trainer, snapshot
from tests.strategies.test_linear_probe import STEPS, WHOLE

BODY, HEAD = 0.05, 0.3


def reference(model, stages):
    """Plain SGD on all samples at once; a stage is (steps, rate of the body or None, of the head, BatchNorm trains)."""
    model = copy.deepcopy(model).double()
    data = tiny_data(model)[:]
    for steps, body, head, moves in stages:
        for _ in range(steps):
            model.train()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train(moves)
            loss = nn.functional.cross_entropy(model(data["pixel_values"].double()).logits, data["labels"])
            parameters = dict(model.named_parameters())
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                    rate = head if name.startswith("classifier") else body
                    if rate is not None:
                        parameter -= rate * gradient
    return snapshot(model)


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        (LPFTConfig(head_lr=HEAD), [(STEPS // 2, None, HEAD, False), (STEPS // 2, BODY, BODY, False)]),
        (LPFTConfig(head_lr=HEAD, probe=1 / 3, norm_mode="auto"), [(2, None, HEAD, False), (4, BODY, BODY, True)]),
    ],
)
def test_stages_written_by_hand(config, stages, tmp_path):
    as_by_hand(config, stages, tmp_path)


def as_by_hand(config, stages, folder):
    model = tiny_resnet()
    expected = reference(model, stages)
    trainer = make_trainer(model, config, folder, **{**WHOLE, "learning_rate": BODY})
    trainer.train()
    found = snapshot(trainer.model)
    counts = {name for name in found if name.endswith("num_batches_tracked")}
    assert all(torch.equal(found.pop(name), expected.pop(name)) for name in counts)
    same_tensors(found, expected, 2e-5)
