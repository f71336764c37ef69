"""Two cycles with fastai's rates, momenta and Adam, checked step by step against a float64 reference."""

import math

import pytest
import torch

from hf_ft import FineTuneConfig, FTTrainer, L2SPConfig, OptionError, State, set_up
from hf_ft.models.norms import norm_layers
from hf_ft.strategies.fine_tune import halves
from hf_ft.testing import TINY_MODELS, tiny_data, tiny_resnet
from hf_ft.testing.training import make_trainer, tiny_arguments

STEPS, RATE, DECAY, BETA2, EPS = 10, 2e-3, 0.01, 0.99, 1e-5
AS_FASTAI = {"learning_rate": RATE, "weight_decay": DECAY, "adam_beta2": BETA2, "adam_epsilon": EPS}
AS_FASTAI |= {"max_grad_norm": 0.0, "max_steps": STEPS, "optim": "adamw_torch"}


class Watched(FTTrainer):
    """Keeps the weights before each step, and the gradients of the step."""

    def training_step(self, model, *args, **kwargs):
        self.before = [*getattr(self, "before", ()), _copies(self.model, lambda p: p)]
        loss = super().training_step(model, *args, **kwargs)
        self.gradients = [*getattr(self, "gradients", ()), _copies(self.model, lambda p: p.grad)]
        return loss


def _copies(model, part):
    found = {name: part(parameter) for name, parameter in model.named_parameters()}
    return {name: value.detach().double().clone() for name, value in found.items() if value is not None}


def half_cosine(a, b, v):
    return a + (1 - math.cos(math.pi * v)) / 2 * (b - a)


def rises_and_falls(values, peak, u):
    low, high, last = values
    return half_cosine(low, high, u / peak) if u < peak else half_cosine(high, last, (u - peak) / (1 - peak))


def group_of(name, lower, head, norms):
    if name.startswith(head):
        return "head"
    half = "lower" if any(name.startswith(module) for module in lower) else "upper"
    return half, any(name.rpartition(".")[0] == norm for norm in norms)


PEAKS = {"head": (1.0, 0.5), ("lower", True): (0.1, 0.005), ("upper", True): (0.1, 0.05)}
PEAKS |= {("lower", False): (None, 0.005), ("upper", False): (None, 0.05)}


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_every_step_is_fastais(name, tmp_path):
    model = TINY_MODELS[name]()
    config = FineTuneConfig(freeze=0.4)
    lower = halves(config.anatomy(model))[0]
    norms = {layer for layer, _ in norm_layers(model)}
    trainer = Watched(model, tiny_arguments(tmp_path, **AS_FASTAI), strategy=config, train_dataset=tiny_data(model))
    trainer.train()
    trainer.before.append(_copies(model, lambda p: p))
    moved = set()
    for key, weight in trainer.before[0].items():
        group = group_of(key, lower, "classifier", norms)
        frozen_peak, peak = PEAKS[group]
        decay = 0.0 if key.endswith("bias") or (group != "head" and group[1]) else DECAY
        first = torch.zeros_like(weight)
        second = torch.zeros_like(weight)
        for step in range(STEPS):
            cycle, u = (0, step / 4) if step < 4 else (1, (step - 4) / 6)
            top, share, div = ((frozen_peak, 0.99, 25), (peak, 0.3, 5))[cycle]
            if step == 4:
                first, second = torch.zeros_like(weight), torch.zeros_like(weight)
            gradient = trainer.gradients[step].get(key)
            if top is None:
                assert gradient is None
            elif gradient is not None:
                rate = RATE * top * rises_and_falls((1 / div, 1, 1e-5), share, u)
                beta, count = rises_and_falls((0.95, 0.85, 0.95), share, u), step + 1 - 4 * cycle
                first = beta * first + (1 - beta) * gradient
                second = BETA2 * second + (1 - BETA2) * gradient**2
                scaled = (second / (1 - BETA2**count)).sqrt() + EPS
                weight = weight * (1 - rate * decay) - rate / (1 - beta**count) * first / scaled
            found = trainer.before[step + 1][key]
            torch.testing.assert_close(found, weight, atol=1e-7, rtol=1e-5, msg=lambda m, k=key, s=step: f"{k} {s} {m}")
            moved |= {(group, cycle)} if not torch.equal(found, trainer.before[step][key]) else set()
    assert moved == {(g, c) for g, peaks in PEAKS.items() for c in (0, 1) if peaks[c]}


def test_a_single_stage_follows_its_schedule_under_any_arguments(tmp_path):
    trainer = make_trainer(
        tiny_resnet(), [FineTuneConfig(freeze=0.0), L2SPConfig()], tmp_path, max_steps=4, warmup_steps=2, optim="sgd",
        optim_args=None, learning_rate=0.1,
    )  # fmt: skip
    rates = []
    trainer.log = lambda logs, *_: rates.append(logs.get("learning_rate"))
    trainer.train()
    wanted = [0.1 * 0.005 * rises_and_falls((0.2, 1, 1e-5), 0.3, step / 4) for step in range(4)]
    assert rates[:4] == pytest.approx(wanted)


def test_momentum_of_sgd_follows_and_plain_sgd_has_none():
    run = set_up(tiny_resnet(), FineTuneConfig())
    for momentum in (0.9, 0.0):
        objective = run.objective()
        optimizer = torch.optim.SGD(run.param_groups(lr=0.1), momentum=momentum)
        at = run.stepper(objective, 10, optimizer=optimizer)
        at(0)
        assert {group["momentum"] for group in optimizer.param_groups} == {0.95 if momentum else 0.0}
        at(5)
        wanted = rises_and_falls((0.95, 0.85, 0.95), 0.3, 3 / 8)
        found = [group["momentum"] for group in optimizer.param_groups]
        assert found == pytest.approx([wanted if momentum else 0.0] * len(found))


def test_a_custom_scheduler_is_refused(tmp_path):
    model = tiny_resnet()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(OptionError, match=r"cannot follow the schedule of 'fine_tune'"):
        FTTrainer(
            model, tiny_arguments(tmp_path), strategy=FineTuneConfig(freeze=0.0), train_dataset=tiny_data(model),
            optimizers=(optimizer, scheduler),
        )  # fmt: skip


def test_norms_may_stay_frozen_in_the_first_cycle():
    stage = FineTuneConfig(train_norms=False).plan(tiny_resnet(), State()).stages[0]
    assert stage.trains == ("classifier",)
