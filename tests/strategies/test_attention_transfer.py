"""Attention transfer: the formula on maps and tokens, and layers without several positions."""

import copy

import numpy as np
import pytest
import torch

from hf_ft import AttentionTransferConfig, OptionError, State, anatomy, set_up
from hf_ft.models.feature_hooks import activations
from hf_ft.testing import TINY_MODELS, tiny_inputs, tiny_resnet, tiny_vit, train
from tests.strategies.perturbed_model import moved


def attention(features):
    """One sample's map, by loops over (positions, channels)."""
    energy = [sum(float(v) ** 2 for v in position) / len(position) for position in features]
    norm = sum(e**2 for e in energy) ** 0.5
    return [e / norm for e in energy]


def by_position(features):
    return (features.flatten(2).transpose(1, 2) if features.dim() == 4 else features).double()


@pytest.mark.parametrize("name", ["resnet", "convnext", "vit", "swin"])
def test_the_term_is_the_formula(name):
    model = TINY_MODELS[name]()
    start = copy.deepcopy(model)
    run = set_up(model, AttentionTransferConfig(beta=7.0))
    objective = run.objective().train()
    moved(model)
    batch = tiny_inputs(model, 3)
    value = objective(**batch)["terms"]["attention_transfer"].item()
    layers = run.plan.terms[0].layers
    now, before = (activations(m, layers, batch) for m in (model, start))
    total = 0.0
    for layer in layers:
        differences = []
        for one, other in zip(by_position(now[layer]), by_position(before[layer]), strict=True):
            differences += [(a - b) ** 2 for a, b in zip(attention(one), attention(other), strict=True)]
        total += sum(differences) / len(differences)
    assert value == pytest.approx(7.0 * total, rel=1e-4) and value > 0


def test_default_layers_are_the_ends_of_stages():
    def layers(name):
        return AttentionTransferConfig().plan(TINY_MODELS[name](), State()).terms[0].layers

    assert layers("resnet") == ("resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.1.layers.1")
    assert layers("mobilenet_v2") == tuple(f"mobilenet_v2.layer.{i}" for i in (1, 4, 11, 15))
    assert layers("bert") == tuple(f"bert.encoder.layer.{i}" for i in range(3))
    deep = TINY_MODELS["vit"](num_hidden_layers=12)
    found = AttentionTransferConfig().plan(deep, State()).terms[0].layers
    blocks = [block.modules[0] for block in anatomy(deep).blocks]
    assert found == tuple(blocks[i] for i in (2, 5, 8, 11)), "four groups of a network without stages"


def test_maps_of_one_position_are_refused(tmp_path):
    config = AttentionTransferConfig(layers=("mobilenet_v2.layer.15",))
    with pytest.raises(OptionError, match="single position.*DELTAConfig"):
        train(TINY_MODELS["mobilenet_v2"](), config, tmp_path)


def test_unknown_layers_and_none():
    with pytest.raises(OptionError, match="no module 'stage4'"):
        AttentionTransferConfig(layers=("stage4",)).plan(tiny_resnet(), State())
    with pytest.raises(OptionError, match=r"layers=\(\)"):
        AttentionTransferConfig(layers=()).plan(tiny_resnet(), State())
    assert AttentionTransferConfig(beta=0.0).plan(tiny_vit(), State()).terms == ()


def test_features_that_are_all_zero_or_constant_give_no_nan(tmp_path):
    model = tiny_resnet()
    with torch.no_grad():
        for block in (model.resnet.encoder.stages[1].layers[1].layer[1].normalization,):
            block.weight.zero_()
            block.bias.zero_()
        model.resnet.embedder.embedder.convolution.weight.zero_()
    trainer = train(model, AttentionTransferConfig(), tmp_path)
    assert np.isfinite([e["loss/attention_transfer"] for e in trainer.state.log_history if "loss" in e]).all()
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
