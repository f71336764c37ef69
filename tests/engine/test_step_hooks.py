"""Changes to gradients and rates at an optimizer's steps: after unscaling, once, and through wrappers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_ft import OptionError
from hf_ft.core import GradientChange, Plan
from hf_ft.core.plan import Average
from hf_ft.engine.averaging import RunningAverage
from hf_ft.engine.step_hooks import attach, step_seed


def linear():
    model = nn.Linear(3, 2)
    nn.init.ones_(model.weight)
    return model


def seen(model, optimizer, on=("weight",)):
    """What a hook saw that halves the gradient; it is attached to the optimizer."""
    calls = []

    def halve(names, gradients, seed):
        calls.append((names, [gradient.clone() for gradient in gradients], seed))
        torch._foreach_mul_(gradients, 0.5)

    attach(optimizer, model, Plan(gradients=(GradientChange("halved", halve, on),)), lambda: len(calls))
    return calls


def backward(model):
    model(torch.ones(1, 3)).sum().backward()


def test_only_the_named_gradients_change_just_before_the_step():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    calls = seen(model, optimizer)
    bias = model.bias.detach().clone()
    for _ in range(2):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    assert [names for names, *_ in calls] == [("weight",)] * 2
    assert [seed for *_, seed in calls] == [step_seed(0, 0), step_seed(1, 0)] and step_seed(0, 0) != step_seed(1, 0)
    once = 1 - (0.5 + 0.1)  # the optimizer's own decay is not halved
    assert torch.allclose(model.weight, torch.full((2, 3), once - (0.5 + 0.1 * once)))
    assert torch.allclose(model.bias, (bias - (1 + 0.1 * bias)) * 0.9 - 1)


def test_a_second_training_with_the_same_optimizer_replaces_the_first():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first, second = seen(model, optimizer), seen(model, SimpleNamespace(optimizer=optimizer))
    backward(model)
    optimizer.step()
    assert len(first) == 0 and len(second) == 1
    attach(optimizer, model, Plan(), lambda: 0)
    optimizer.step()
    assert len(second) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_and_overflows_skipped(fused):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    calls, scaler = seen(model, optimizer), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for scale in (1.0, float("inf")):
        scaler.scale(model(torch.ones(1, 3)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    ((_, (gradient,), _),) = calls
    assert torch.equal(gradient, torch.ones(2, 3)) and torch.equal(model.weight, torch.full((2, 3), 0.5))


def test_names_that_another_strategy_replaced_are_refused():
    model = linear()
    with pytest.raises(OptionError, match="'base.weight', which the model no longer has"):
        seen(model, torch.optim.SGD(model.parameters(), lr=1.0), on=("base.weight",))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_does_not_count_in_an_average(fused):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    average, scaler = RunningAverage(model, ["weight"], Average(lambda step: 0.5)), torch.amp.GradScaler("cpu")
    average.start(0, optimizer)
    for scale in (1.0, float("inf")):
        scaler.scale(model(torch.ones(1, 3)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert average.steps == 1
