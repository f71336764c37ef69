"""The probe by logistic regression: the minimum of its formula, in float64, on the input of the head's layer."""

import pytest
import torch

from hf_ft import LinearProbeConfig, LPFTConfig, OptionError, set_up
from hf_ft.engine import probe
from hf_ft.engine.probe import STRENGTHS, logistic_probe
from hf_ft.models.feature_hooks import activations
from hf_ft.testing import TINY_MODELS, same_tensors, tiny_data, tiny_resnet, tiny_vit
from hf_ft.testing.training import make_trainer, snapshot


def planted(classes, count=120, d=6, seed=0, noise=1.0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = 2 * torch.randn(classes, d, generator=random)
    return 3 + centres[labels] + noise * torch.randn(count, d, generator=random), labels


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_solution_is_a_minimum_of_the_formula(classes, weighted, monkeypatch):
    monkeypatch.setattr(probe, "ITERATIONS", 5000)
    features, labels = planted(classes)
    class_weights = torch.tensor([0.5, 2.0, 1.0])[:classes] if weighted else None
    found = logistic_probe(features, labels, classes, class_weights)
    mean, spread = features.double().mean(), features.double().std(correction=0)
    x = (features.double() - mean) / spread
    # Back to the normalised form of the features.
    weight = found.weight.double() * spread
    bias = found.bias.double() + found.weight.double().sum(dim=1) * mean
    if classes == 2:  # scikit-learn's single row is the difference of the two
        assert torch.allclose(weight[0], -weight[1])
        weight, bias = (2 * weight[1:]).requires_grad_(), 2 * bias[1:]
        logits = torch.cat((torch.zeros(len(x), 1), x @ weight.T + bias), dim=1)
    else:
        weight.requires_grad_()
        logits = x @ weight.T + bias
    losses = torch.nn.functional.cross_entropy(
        logits, labels, reduction="sum", weight=None if class_weights is None else class_weights.double()
    )
    (found.strength * losses + weight.square().sum() / 2).backward()
    assert float(weight.grad.abs().max()) < 1e-2 * float(weight.detach().abs().max()), found.strength
    assert found.strength in STRENGTHS and found.held_out == 24


def test_the_penalty_is_chosen_on_held_out_samples():
    features, labels = planted(3, noise=0.1)
    assert logistic_probe(features, labels, 3).accuracy == 1.0
    noise = torch.randn(200, 40, generator=torch.Generator().manual_seed(1))
    features, labels = planted(2, 200, 2, noise=5.0)
    blurred = logistic_probe(torch.cat((features, noise), dim=1), labels, 2)
    assert 0.55 < blurred.accuracy < 1.0 and blurred.strength < STRENGTHS[-1]


def test_a_class_without_samples_is_never_predicted():
    features, labels = planted(3)
    found = logistic_probe(features, torch.where(labels == 1, 3, labels), 4)
    logits = features @ found.weight.T + found.bias
    assert not found.weight[1].any() and set(logits.argmax(dim=1).tolist()) == {0, 2, 3}
    unlabelled = torch.where(torch.arange(120) < 30, -100, labels)
    part = logistic_probe(features[30:], labels[30:], 3)
    assert torch.equal(logistic_probe(features, unlabelled, 3).weight, part.weight)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_the_linear_probe_is_fitted_before_training_which_changes_nothing(make, tmp_path):
    trainer = make_trainer(make(), LinearProbeConfig(probe_solver="lbfgs"), tmp_path, num_train_epochs=1, max_steps=-1)
    trainer.train()
    model = make()
    layer = "classifier.1" if make is tiny_resnet else "classifier"
    data = tiny_data(model)[:]
    features = activations(model, [f"input:{layer}"], data)[f"input:{layer}"]
    expected = logistic_probe(features, data["labels"], 3)
    after = snapshot(trainer.model)
    head = {"weight": after[f"{layer}.weight"], "bias": after[f"{layer}.bias"]}
    same_tensors(head, {"weight": expected.weight, "bias": expected.bias}, 1e-4)
    before = snapshot(model)
    same_tensors(*({k: v for k, v in part.items() if not k.startswith(layer)} for part in (before, after)))
    assert "logistic regression with C = " in trainer.configs[0].findings(trainer.states["linear_probe"]).summary


def test_lp_ft_fine_tunes_from_the_fitted_probe(tmp_path):
    config = LPFTConfig(probe_solver="lbfgs")
    trainer = make_trainer(tiny_resnet(), config, tmp_path, learning_rate=0.0)
    trainer.train()
    probed = make_trainer(tiny_resnet(), LinearProbeConfig(probe_solver="lbfgs"), tmp_path / "probe")
    probed.train()
    same_tensors(snapshot(trainer.model), snapshot(probed.model))
    plan = set_up(tiny_resnet(), config, states=trainer.states).plan
    assert [stage.name for stage in plan.stages] == ["finetune"] and not plan.stages[0].dropout
    moving = make_trainer(tiny_resnet(), config, tmp_path / "moving")
    moving.train()
    stem = "resnet.embedder.embedder.convolution.weight"
    assert not torch.equal(snapshot(probed.model)[stem], snapshot(moving.model)[stem])


def test_what_it_cannot_fit_is_refused(tmp_path):
    config = LinearProbeConfig(probe_solver="lbfgs")
    with pytest.raises(OptionError, match="needs a head of one linear layer; this one has the layers classifier.dense"):
        make_trainer(TINY_MODELS["roberta"](), config, tmp_path).train()
    with pytest.raises(OptionError, match="the state holds no probe. Measure first"):
        set_up(tiny_resnet(), config, states={})
    with pytest.raises(OptionError, match="at least two classes"):
        logistic_probe(torch.randn(10, 3), torch.zeros(10, dtype=torch.int64), 2)
    with pytest.raises(OptionError, match="holds out 3 samples, and there are only 3"):
        logistic_probe(torch.randn(3, 3), torch.arange(3), 3)
    labels = torch.arange(10) % 2
    with pytest.raises(OptionError, match="without the 5 samples that are held out, only one class is left"):
        logistic_probe(torch.randn(10, 3), labels, 2, groups=labels.numpy())
