"""The learning rate that is fitted to a head: the bound behind it, and how strategies use it."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_ft import BlockwiseConfig, CollaborativeModel, DAFTConfig, FTTrainer, LinearProbeConfig, LPFTConfig, OptionError
from hf_ft.core.context import Samples
from hf_ft.core.head_rate import STEP, HeadFit, fit_head, loss_curvature
from hf_ft.functional import feature_spread, head_curvature, stable_rate
from hf_ft.models.anatomy import anatomy
from hf_ft.testing import same_tensors, tiny_bert, tiny_data, tiny_inputs, tiny_resnet
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments, train

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.0}


def features(samples=40, width=6, seed=0):
    return torch.rand(samples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


# --- the bound ----------------------------------------------------------------------------------------------


def test_the_curvature_is_the_largest_eigenvalue_of_the_second_moment():
    f = features()
    z = np.concatenate([f.numpy(), np.ones((40, 1))], axis=1)
    moment = sum(np.outer(row, row) for row in z) / 40
    assert float(head_curvature(f)) == pytest.approx(np.linalg.eigvalsh(moment)[-1], rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "classes", "loss"),
    [
        ("single_label_classification", 3, nn.CrossEntropyLoss()),
        ("multi_label_classification", 3, nn.BCEWithLogitsLoss()),
        ("regression", 2, nn.MSELoss()),
    ],
)
def test_no_hessian_of_a_head_exceeds_it(kind, classes, loss):
    """For weights of every size, the largest eigenvalue of the exact Hessian; the squared error's reaches it."""
    f, model = features(), nn.Linear(1, 1)
    model.config = type("Config", (), {"problem_type": kind, "num_labels": classes})()
    labels = torch.arange(40) % classes
    target = labels if classes == 3 and kind.startswith("single") else nn.functional.one_hot(labels, classes).double()
    bound = loss_curvature(model) * float(head_curvature(f))

    def value(flat):
        weight, bias = flat[:-classes].reshape(classes, -1), flat[-classes:]
        return loss(f @ weight.T + bias, target)

    largest = 0.0
    for size in (0.0, 0.1, 1.0, 10.0):
        flat = torch.randn(classes * 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * size
        hessian = torch.autograd.functional.hessian(value, flat)
        largest = max(largest, float(torch.linalg.eigvalsh(hessian)[-1]))
    assert largest <= bound * (1 + 1e-9)
    assert largest > bound / 4
    if kind == "regression":
        assert largest == pytest.approx(bound)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_is_stable_up_to_the_rate_and_not_above(momentum):
    """On the quadratic loss of a head with squared errors."""
    f = features()
    z = nn.functional.pad(f, (0, 1), value=1.0)
    target = torch.rand(40, 1, dtype=torch.float64)
    bound = stable_rate(2 * float(head_curvature(f)), momentum)
    least = nn.functional.mse_loss(z @ torch.linalg.lstsq(z, target).solution, target)

    def after(rate):
        weight = torch.zeros(7, 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=rate, momentum=momentum)
        for _ in range(3000):
            optimizer.zero_grad()
            nn.functional.mse_loss(z @ weight, target).backward()
            optimizer.step()
        return float(nn.functional.mse_loss(z @ weight, target) - least)

    assert after(0.99 * bound) < 0.1
    assert not after(1.01 * bound) < 100


# --- fitting ------------------------------------------------------------------------------------------------


def samples_of(model, count=24):
    rows = tiny_inputs(model, count)
    return Samples(count, lambda chosen: {name: value[torch.as_tensor(chosen)] for name, value in rows.items()})


def test_rates_under_both_families_of_optimizers():
    fit = HeadFit(curvature=885.0, feature_spread=987.0)
    assert fit.rate("sgd") == pytest.approx(2 * 1.9 / (885 / 2), rel=0.02)
    assert fit.rate("sgd", momentum=0.0) == pytest.approx(2 / (885 / 2), rel=0.02)
    assert fit.rate("adamw_torch") == fit.rate("adafactor") == pytest.approx(STEP / 987, rel=0.03)
    assert HeadFit(1e-30, 1e-30).rate("sgd") == HeadFit(1e-30, 0.0).rate("adam") == 1.0


def test_the_features_are_those_of_eval_mode_and_nothing_changes():
    model = tiny_resnet().train()
    before, random = snapshot(model), torch.get_rng_state()
    fit = fit_head(model, anatomy(model), samples_of(model))
    same_tensors(snapshot(model), before)
    assert model.training and torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        seen = model.eval().resnet(tiny_inputs(model, 24)["pixel_values"]).pooler_output.flatten(1)
    assert fit.curvature == pytest.approx(float(head_curvature(seen)), rel=1e-6)
    spread = sum((one - sum(seen) / len(seen)).abs().sum() for one in seen.double()) / len(seen)
    assert fit.feature_spread == pytest.approx(float(spread), rel=1e-6)
    shifted = feature_spread(seen + 100 * torch.randn(seen.shape[1]))
    assert float(shifted) == pytest.approx(float(spread), rel=1e-4), "what all samples share does not count"


def test_of_several_members_the_one_with_most_curvature_decides():
    ensemble = CollaborativeModel.from_members([tiny_resnet(), tiny_resnet(hidden_sizes=[8, 24])])
    parts = anatomy(ensemble)
    fits = [fit_head(ensemble, member, samples_of(ensemble)) for _, member in parts.members]
    both = fit_head(ensemble, parts, samples_of(ensemble))
    assert len(fits) == 2 and fits[0].curvature != fits[1].curvature
    assert both.curvature == max(fit.curvature for fit in fits)


def test_behind_an_adapter_the_head_s_own_input_counts():
    plain = tiny_bert()
    adapted = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["classifier"]))
    fit = fit_head(adapted, anatomy(adapted), samples_of(plain))
    assert fit.curvature == pytest.approx(fit_head(plain, anatomy(plain), samples_of(plain)).curvature, rel=1e-6)


def test_inputs_that_are_not_finite_are_refused():
    model = tiny_resnet()
    rows = tiny_inputs(model, 8)
    rows["pixel_values"][3] = torch.nan
    broken = Samples(8, lambda chosen: {name: value[torch.as_tensor(chosen)] for name, value in rows.items()})
    with pytest.raises(OptionError, match="'classifier.1' is not finite"):
        fit_head(model, anatomy(model), broken)


# --- in strategies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LinearProbeConfig(), LPFTConfig(), DAFTConfig(), BlockwiseConfig(block="stage1")])
@pytest.mark.parametrize("arguments", [SGD, {"optim": "adamw_torch"}], ids=["sgd", "adam"])
def test_the_head_trains_at_the_reported_rate(config, arguments, tmp_path):
    # TrainingArguments' default rate counts as not set.
    rate = 5e-5 if isinstance(config, LinearProbeConfig) else 1e-3
    trainer = make_trainer(tiny_resnet(), config, tmp_path, learning_rate=rate, **arguments)
    trainer.train()
    info = trainer.states[config.ft_type].info
    fit = fit_head(tiny_resnet(), anatomy(tiny_resnet()), trainer.context().samples)
    assert info["head_lr"] == fit.rate(arguments["optim"])
    bias = trainer.model.classifier[1].bias
    [group] = [g for g in trainer.optimizer.param_groups if any(p is bias for p in g["params"])]
    assert group["initial_lr"] == info["head_lr"]
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"The learning rate of the head, {info['head_lr']:g}, was fitted" in card


@pytest.mark.parametrize(("chosen", "rate"), [(0.25, 0.25), (None, 1e-3)])
@pytest.mark.parametrize("config", [LinearProbeConfig, DAFTConfig])
def test_what_is_set_is_used(config, chosen, rate, tmp_path):
    trainer = train(tiny_resnet(), config(head_lr=chosen), tmp_path, learning_rate=1e-3, **SGD)
    assert max(group["initial_lr"] for group in trainer.optimizer.param_groups) == rate


def test_a_probe_takes_the_learning_rate_that_was_set(tmp_path):
    trainer = train(tiny_resnet(), LinearProbeConfig(), tmp_path, learning_rate=0.125, **SGD)
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.125}


def test_no_warning_if_an_unset_rate_is_fitted(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_ft.trainer.checks.logger.warning", said.append)
    make_trainer(tiny_resnet(), LinearProbeConfig(), tmp_path, learning_rate=5e-5)
    assert not said


def test_a_stream_cannot_be_looked_at(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_ft.core.head_rate.logger.warning", said.append)
    model = tiny_resnet()
    stream = tiny_data(model).to_iterable_dataset()
    config = DAFTConfig(convert_batch_norm=False)
    trainer = FTTrainer(model, tiny_arguments(tmp_path, **SGD), strategy=config, train_dataset=stream)
    trainer.train()
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-2}
    assert len(said) == 1 and "daft.head_lr='auto' uses learning_rate=0.01" in said[0]
