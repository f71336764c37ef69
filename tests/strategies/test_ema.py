"""The weights' average, step by step, is evaluated, saved and left in the model; training ignores it."""

import pytest
import torch

from hf_ft import EMAConfig, OptionError, State, compose, set_up
from hf_ft.testing import TINY_MODELS, same_tensors, tiny_resnet
from hf_ft.testing.training import snapshot, tiny_batch


def averages(history, decay, parameters):
    """The average of weights (steps + 1 of them), in float64; other tensors are those of the last step."""
    average = {name: value.double() for name, value in history[0].items()}
    for step, weights in enumerate(history[1:]):
        d = min(decay, (1 + step) / (10 + step))
        for name, value in weights.items():
            averaged = name in parameters
            average[name] = d * average[name] + (1 - d) * value.double() if averaged else value.double()
    return average


def loop(model, strategy, steps=12):
    """A custom loop; returns the run, and the live weights before and after each step."""
    run = set_up(model, strategy)
    objective, history = run.objective(), [snapshot(model)]
    optimizer = torch.optim.SGD(run.param_groups(lr=0.05))
    begin_step = run.stepper(objective, steps, optimizer=optimizer)
    objective.train()
    for step in range(steps):
        begin_step(step)
        objective(**tiny_batch(objective, 8, step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(snapshot(model))
    return run, history


@pytest.mark.parametrize("decay", [0.3, 0.99])  # below and above what the warm-up reaches
@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_the_formula_step_by_step(name, decay):
    torch.manual_seed(0)
    run, history = loop(TINY_MODELS[name](), EMAConfig(decay=decay))
    torch.manual_seed(0)
    _, plain = loop(TINY_MODELS[name](), "full")
    same_tensors(history[-1], plain[-1])  # training itself is left as it is
    wanted = averages(history, decay, dict(run.model.named_parameters()))
    with run.averaged():
        inside = snapshot(run.model)
    same_tensors(snapshot(run.model), history[-1])
    same_tensors(inside, wanted, 1e-6)
    head = next(key for key in inside if key.startswith("classifier") and key.endswith("weight"))
    assert float((inside[head] - history[-1][head]).abs().max()) > 1e-3
    same_tensors(snapshot(run.finish()), inside)
    with run.averaged():  # it has ended: later changes of the model are left alone
        same_tensors(snapshot(run.model), inside)


class ScheduleFree(torch.optim.SGD):
    def eval(self):
        """Would replace the weights by the optimizer's own average."""


def test_a_loop_must_name_its_optimizer_and_two_averages_are_refused():
    run = set_up(tiny_resnet(), "ema")
    with pytest.raises(OptionError, match=r"pass optimizer=\.\.\. to stepper"):
        run.stepper(run.objective(), 4)
    with pytest.raises(OptionError, match="both average the weights"):
        compose([EMAConfig(decay=decay).plan(tiny_resnet(), State()) for decay in (0.5, 0.9)])
    optimizer = ScheduleFree(run.param_groups(lr=0.05))
    with pytest.raises(OptionError, match="optim: ScheduleFree averages the weights itself"):
        run.stepper(run.objective(), 4, optimizer=optimizer)(0)
