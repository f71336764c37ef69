"""DELTA: the formula, and channel weights compared with networks whose channels are zeroed one at a time."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_ft import DELTAConfig, LPFTConfig, OptionError, State, TREDConfig, anatomy, set_up
from hf_ft.core.config import load_configs
from hf_ft.models.feature_hooks import activations
from hf_ft.strategies.delta.channel_weights import _growth, _Suffix, attention_weights
from hf_ft.testing import TINY_MODELS, tiny_bert, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.training import make_trainer
from tests.strategies.perturbed_model import moved


def term_values(config, model, states=None):
    """The terms of the loss for a changed model in eval mode, and the layers' states before and after."""
    start = copy.deepcopy(model)
    run = set_up(model, config, states=states or {})
    objective = run.objective()
    objective.train()
    moved(model)
    batch = tiny_inputs(model)
    terms = {name: value.item() for name, value in objective(**batch)["terms"].items()}
    layers = next(term.layers for term in run.plan.terms if term.layers)
    states = [activations(m, layers, batch) for m in (model, start)]
    return terms, [tuple(found[layer].double() for found in states) for layer in layers]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_terms_are_the_formula(make, reduction):
    model = make()
    layers = DELTAConfig().plan(make(), State({n: torch.ones(1) for n, _ in model.named_modules()})).terms[0].layers
    torch.manual_seed(0)
    weights = {layer: torch.rand(16).softmax(0)[: 8 if layer.endswith("stages.0.layers.0.layer.1.convolution") else 16]
               for layer in layers}  # fmt: skip
    config = DELTAConfig(alpha=0.3, beta=0.7, reduction=reduction)
    terms, pairs = term_values(config, model, {"delta": State(weights)})
    total = 0.0
    for (now, before), a in zip(pairs, weights.values(), strict=True):
        if now.dim() == 3:
            now, before = now.transpose(1, 2), before.transpose(1, 2)
        now, before = now.flatten(2), before.flatten(2)  # (B, C, positions)
        batch, channels, positions = now.shape
        for sample in range(batch):
            for c in range(channels):
                distance = sum(float(d) ** 2 for d in now[sample, c] - before[sample, c])
                total += channels * float(a[c]) * distance / positions / (batch if reduction == "mean" else 64)
    head = sum(float(p.detach().double().square().sum()) for p in model.classifier.parameters())
    assert terms["delta"] == pytest.approx(0.3 * total / 2, rel=1e-5) and total > 0
    assert terms["delta_head"] == pytest.approx(0.7 / 2 * head, rel=1e-5)


def test_uniform_weights_are_one_over_the_number_of_channels():
    uniform, _ = term_values(DELTAConfig(weights="uniform"), tiny_resnet())
    layers = DELTAConfig(weights="uniform").plan(tiny_resnet(), State()).terms[0].layers
    even = {name: torch.full((size,), 1 / size) for name, size in zip(layers, (8, 16), strict=True)}
    weighed, _ = term_values(DELTAConfig(), tiny_resnet(), {"delta": State(even)})
    assert uniform["delta"] == pytest.approx(weighed["delta"], rel=1e-6)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_with_64_samples_both_plain_and_weighted_are_the_authors_terms(make):
    """Theirs: 0.01 times half the sum over batch, channels and positions, divided by h w if channels are weighted."""
    model, start = make(), make()
    moved(model)
    layers = DELTAConfig(weights="uniform").plan(make(), State()).terms[0].layers
    batch = tiny_inputs(model, 64)
    now, before = (activations(m, layers, batch) for m in (model, start))
    torch.manual_seed(0)
    sizes = {layer: now[layer].shape[1 if now[layer].dim() == 4 else 2] for layer in layers}
    a = {layer: torch.rand(size).softmax(0) for layer, size in sizes.items()}
    plain = weighted = 0.0
    for layer in layers:
        squares = (now[layer] - before[layer]).double().square()
        maps = squares.flatten(2) if squares.dim() == 4 else squares.transpose(1, 2)  # (B, C, positions)
        plain += 0.5 * 0.01 * float(maps.sum())
        per_channel = maps.sum(dim=(0, 2)) * maps.shape[1] * a[layer].double() / maps.shape[2]
        weighted += 0.5 * 0.01 * float(per_channel.sum())
    for reduction in ("mean", "sum"):
        for config, expected in ((DELTAConfig(weights="feature_map"), plain), (DELTAConfig(), weighted)):
            config = dataclasses.replace(config, reduction=reduction)
            run = set_up(make(), config, states={"delta": State(a)})
            objective = run.objective().train()
            moved(run.model)
            terms = objective(**batch)["terms"]
            assert float(terms["delta"]) == pytest.approx(expected, rel=1e-4), (config, reduction)


def test_attention_weights_against_float64():
    growth = torch.tensor([0.3, -0.1, 0.0, 2.0, 0.7], dtype=torch.float64)
    mean = sum(growth.tolist()) / 5
    std = (sum((g - mean) ** 2 for g in growth.tolist()) / 5) ** 0.5
    exps = [2.718281828459045 ** ((g - mean) / std / 5) for g in growth.tolist()]
    expected = torch.tensor([e / sum(exps) for e in exps], dtype=torch.float64)
    torch.testing.assert_close(attention_weights(growth), expected, rtol=1e-12, atol=0)
    assert attention_weights(torch.full((4,), 0.2)).tolist() == [0.25] * 4


def zeroed(model, layer, channel):
    """A copy in which a filter of the layer is zero."""
    model = copy.deepcopy(model)
    module = model.get_submodule(layer)
    with torch.no_grad():
        module.weight[channel] = 0.0
        if module.bias is not None:
            module.bias[channel] = 0.0
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "efficientnet"])
def test_channels_left_out_are_zeroed_filters(name):
    """Several at a time, from the border before their block, equal networks with that one filter set to zero."""
    model = TINY_MODELS[name]()
    batch = tiny_inputs(model, 6)
    config = DELTAConfig()
    for layer in config._layers(model):
        with torch.no_grad():
            suffix = _Suffix(model, layer, config.anatomy(model).parts, batch)
            border = suffix.at_border(batch)
            found = suffix.losses(batch, border, [-1, 0, suffix.channels - 1])
            copies = [model, zeroed(model, layer, 0), zeroed(model, layer, suffix.channels - 1)]
            expected = torch.stack([m(**batch).loss for m in copies])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert suffix.prefix is not None


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
def test_measured_weights(make, tmp_path):
    trainer = train(make(), DELTAConfig(), tmp_path)
    state = trainer.states["delta"]
    layers = trainer._run.plan.terms[0].layers
    assert list(state.tensors) == list(layers)
    for weights in state.tensors.values():
        assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
        assert 0.5 / len(weights) < float(weights.min()) < float(weights.max()) < 3 / len(weights)


@pytest.mark.slow
def test_growth_is_the_loss_without_a_channel_less_the_loss(tmp_path):
    """Over all batches, for each channel, with its sign: channels whose loss hurts most weigh most."""
    model = tiny_resnet()
    layer = DELTAConfig()._layers(model)[-1]
    batches = [tiny_inputs(model, 6, seed) for seed in range(2)]
    context = make_trainer(model, DELTAConfig(), tmp_path).context()
    with torch.no_grad():
        growth = _growth(model, layer, DELTAConfig().anatomy(model).parts, batches, context)
        for channel in range(16):
            without = zeroed(model, layer, channel)
            expected = sum(float(without(**b).loss - model(**b).loss) for b in batches) / 2
            assert float(growth[channel]) == pytest.approx(expected, abs=2e-6), channel
    weights = attention_weights(growth)
    assert int(weights.argmax()) == int(growth.argmax()) and float(growth.abs().max()) > 1e-4


@pytest.mark.slow
def test_measuring_leaves_the_model_and_options_are_kept(tmp_path):
    config = DELTAConfig(alpha=0.1, layers=("resnet.encoder.stages.1",), batches=1, head_epochs=1)
    trainer = train(tiny_resnet(), config, tmp_path / "run")
    trainer.save_model(str(tmp_path / "saved"))
    assert load_configs(tmp_path / "saved") == (config,)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "1901.09229" in card and "Largest channel weight" in card


def test_alpha_zero_measures_nothing():
    config = DELTAConfig(alpha=0.0)
    assert not config.measures() and [t.name for t in config.plan(tiny_resnet(), State()).terms] == ["delta_head"]


def test_an_adapter_and_its_layer_are_one():
    """On a LoRA model, the same feature maps are compared, and names may omit PEFT's prefix."""
    tuner = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"])
    adapted = get_peft_model(tiny_resnet(), tuner)
    prefix = "base_model.model."
    assert DELTAConfig()._layers(adapted) == tuple(prefix + name for name in DELTAConfig()._layers(tiny_resnet()))
    named = DELTAConfig(layers=("resnet.encoder.stages.1",))._layers(adapted)
    assert named == (prefix + "resnet.encoder.stages.1",)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"layers": ("resnet.encoder",)}])
def test_tuples_and_model_outputs(options, tmp_path):
    """A model that returns tuples, and a layer that returns an output with several fields."""
    model = tiny_resnet()
    model.config.return_dict = False
    weights = train(model, DELTAConfig(**options), tmp_path).states["delta"].tensors
    assert all(float(w.sum()) == pytest.approx(1, abs=1e-5) for w in weights.values())


@pytest.mark.slow
def test_a_frozen_head_is_not_replaced_for_measuring(tmp_path):
    tuner = LoraConfig(r=2, target_modules=["convolution"])
    trainer = train(get_peft_model(tiny_resnet(), tuner), DELTAConfig(), tmp_path)
    assert len(trainer.states["delta"].tensors) == 2


def test_layers_are_checked_when_the_trainer_is_made(tmp_path):
    for config in (DELTAConfig(layers=("stage9",)), TREDConfig(layer="stage9")):
        with pytest.raises(OptionError, match="no module 'stage9'"):
            make_trainer(tiny_resnet(), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_invalid_layers():
    with pytest.raises(OptionError, match="no module 'resnet.layer9'.*default would be.*The modules are resnet, "):
        DELTAConfig(layers=("resnet.layer9",), weights="uniform").plan(tiny_resnet(), State())
    with pytest.raises(OptionError, match="no weights were measured for layer"):
        DELTAConfig().plan(tiny_resnet(), State())


@pytest.mark.slow
def test_a_layer_without_channels(tmp_path):
    config = DELTAConfig(layers=("classifier",), weights="uniform")
    with pytest.raises(OptionError, match=r"'classifier' outputs \(8, 3\).*before the pooling"):
        train(tiny_resnet(), config, tmp_path)
    with pytest.raises(OptionError, match="no channels to weigh"):
        train(tiny_resnet(), DELTAConfig(layers=("classifier",)), tmp_path)


@pytest.mark.parametrize("label", [0.5, 4])
def test_regression_cannot_weigh_channels(label, tmp_path):
    model = tiny_resnet(num_labels=1)
    model.config.problem_type = "regression"
    trainer = make_trainer(model, DELTAConfig(), tmp_path)
    trainer.train_dataset = [{"pixel_values": torch.randn(3, 32, 32), "labels": label} for _ in range(8)]
    with pytest.raises(OptionError, match="weights='uniform'"):
        trainer.train()


@pytest.mark.slow
def test_with_lp_ft_the_probe_stage_has_no_such_term(tmp_path):
    """Frozen weights cannot move away from the reference: the term is left out, and the probe's cache stays in use."""
    config = [LPFTConfig(), DELTAConfig(weights="uniform")]
    trainer = train(tiny_resnet(), config, tmp_path, max_steps=16)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["loss/delta" in entry for entry in logged] == [False] * 8 + [True] * 8
    assert all("loss/delta_head" in entry for entry in logged)
    assert logged[8]["loss/delta"] == 0.0  # LP-FT's second stage keeps BatchNorm in eval mode


def test_filters_of_a_linear_layer_are_channels_of_tokens():
    model = tiny_vit()
    layer = anatomy(model).blocks[1].modules[0]
    batch = tiny_inputs(model, 4)
    with torch.no_grad():
        suffix = _Suffix(model, layer, DELTAConfig().anatomy(model).parts, batch)
        found = suffix.losses(batch, suffix.at_border(batch), [3])
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: output * (torch.arange(16) != 3).float()
    )
    with torch.no_grad():
        expected = model(**batch).loss
    handle.remove()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert isinstance(model.get_submodule(layer), nn.Module)
