"""With float16, gradients are scaled so that they do not underflow: in measurements and in a search's training runs."""

from functools import partial

import pytest
import torch
from torch import nn

from hf_ft import set_up
from hf_ft.core.context import Recipe, Samples
from hf_ft.engine.gradients import mean_gradients
from hf_ft.engine.short_training import Batches, fit
from hf_ft.testing import tiny_inputs, tiny_vit

IN_FLOAT16 = {
    "computing": partial(torch.autocast, "cpu", dtype=torch.float16),
    "scaler": partial(torch.amp.GradScaler, "cpu"),
}


def loss_times(factor):
    def loss(model, batch):
        logits = model(pixel_values=batch["pixel_values"]).logits
        return factor * nn.functional.cross_entropy(logits.float(), batch["labels"]), {"logits": logits}

    return loss


def recipe(factor, **more):
    settings = {"learning_rate": 0.1 / factor, "batch_size": 4, "max_grad_norm": 0.0, "task_loss": loss_times(factor)}
    return Recipe(partial(torch.optim.SGD, lr=1.0), lambda steps: lambda step: 1.0, **settings, **more)


def samples(model):
    inputs = tiny_inputs(model, 8)
    return Samples(8, lambda rows: {name: value[rows] for name, value in inputs.items()})


@pytest.mark.parametrize("factor", [1e-7, 1.0, 1e3])  # of which the last overflows at the first scale
def test_measured_gradients(factor):
    model = tiny_vit()
    found = []
    for more in ({}, IN_FLOAT16):
        gradients = mean_gradients(model, list(model.parameters()), samples(model), recipe(factor, **more), range(8))
        found.append(torch.cat([gradient.flatten().clone() for gradient in gradients]))
    assert torch.linalg.vector_norm(found[1] - found[0]) < 0.02 * torch.linalg.vector_norm(found[0])


def test_short_trainings():
    found = []
    for more in ({}, IN_FLOAT16):
        model = tiny_vit()
        run, given = set_up(model, "full"), recipe(1e-7, **more)
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        fit(run, given, Batches(samples(model)), range(8), 1, 0, lambda epoch, objective: None)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
    assert torch.linalg.vector_norm(found[1] - found[0]) < 0.02 * torch.linalg.vector_norm(found[0])
