"""Containers that hold only frozen modules rest with them: what they apply themselves is off in training, too."""

import pytest
import torch

from hf_ft import FTTrainer, anatomy, set_up
from hf_ft.engine.frozen.find_prefix import find_prefix
from hf_ft.models.feature_hooks import Taps
from hf_ft.models.parts import Chain
from hf_ft.models.preserve import random_states_kept
from hf_ft.testing import tiny_inputs
from hf_ft.testing.training import tiny_arguments, tiny_data
from tests.functional_dropout import KINDS, inputs, tiny


def head_inputs(model, batch, seed=0):
    with random_states_kept(seed), torch.no_grad(), Taps(model, (), anatomy(model).head.modules) as taps:
        model(**batch)
    return taps.features


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_sees_the_features_of_evaluation(kind):
    model = tiny(kind)
    batch = inputs(model)
    still = head_inputs(model, batch)
    assert any(not torch.equal(head_inputs(model.train(), batch, seed), still) for seed in range(4)), (
        "nothing is tested"
    )
    objective = set_up(model, "linear_probe").objective()
    for seed in range(4):
        assert torch.equal(head_inputs(objective.train().model, batch, seed), still)


def test_a_partly_trained_container_is_in_train_mode():
    """Its SpecAugment lies between the frozen convolutions and the layers that train."""
    model = tiny("wav2vec2")
    model.freeze_feature_encoder()
    set_up(model, "full").objective().train()
    assert model.wav2vec2.training and model.wav2vec2.encoder.training and model.wav2vec2.feature_projection.training
    set_up(model, "gradual_unfreezing").objective().train()
    assert not model.wav2vec2.training and not model.wav2vec2.encoder.training


@pytest.mark.parametrize("kind", ["biogpt", "opt"])
def test_a_probe_on_recorded_features_ends_the_same(kind, tmp_path):
    heads = []
    for use in ("never", "always"):
        model = tiny(kind)
        args, data = tiny_arguments(tmp_path, max_steps=6), tiny_data(model, 16)
        FTTrainer(model, args, strategy="linear_probe", train_dataset=data, frozen_cache=use).train()
        heads.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.allclose(*heads, rtol=0, atol=1e-6)


def prefix_before_last_layer(model):
    parts = anatomy(model).parts
    last = [index for index, part in enumerate(parts) if part.name.startswith("block")][-1]
    return find_prefix(model, [Chain("", parts[last:])], tiny_inputs(model, 2), tiny_inputs(model, 3, seed=1))


@pytest.mark.newest
def test_nothing_is_recorded_behind_a_layer_that_may_be_dropped():
    """However rarely, or always: the container that drops it is in train mode, since its last layer trains."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0}
    found = [prefix_before_last_layer(tiny("biogpt", **quiet, layerdrop=rate)) for rate in (0.0, 1e-6, 1.0)]
    assert found[0].borders == ("biogpt.layers.1",)
    assert not any("layers" in border for prefix in found[1:] if prefix for border in prefix.borders)


def test_gradients_pass_through_what_is_frozen_behind_a_trained_part():
    """Reformer's reversible layers refuse to do so in eval mode."""
    model = tiny("reformer")
    model.reformer.encoder.layers[0].requires_grad_(False)
    objective = set_up(model, "full").objective().train()
    objective(**inputs(model))["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.reformer.embeddings.parameters())
