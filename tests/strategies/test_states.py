"""A state that was damaged, or measured on another model, is refused before it can spoil a training run."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import save_file

from hf_ft import (
    CheckpointError,
    CoTuningConfig,
    DAFTConfig,
    DELTAConfig,
    LinearProbeConfig,
    LPFTConfig,
    OptionError,
    State,
    TREDConfig,
    set_up,
)
from hf_ft.engine.checkpoint import STATE_NAME, read_states, write_states
from hf_ft.engine.checkpoint_folders import last_checkpoint
from hf_ft.testing import tiny_resnet, train
from hf_ft.testing.training import equipped, make_trainer
from tests.trainer.measuring_strategy import MeasuredConfig

CONFIGS = {
    "delta": DELTAConfig(head_epochs=1, batches=1),
    "tred": TREDConfig(epochs=1),
    "tred branches": TREDConfig(epochs=1, disentangler="branches"),
    "daft": DAFTConfig(),
    "co_tuning": CoTuningConfig(),
    "linear_probe": LinearProbeConfig(probe_solver="lbfgs"),
    "lp_ft": LPFTConfig(probe_solver="lbfgs"),
    "measured": MeasuredConfig(),
}
NOT_NEGATIVE = {"delta", "co_tuning"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The state of each strategy on the same model and data."""
    folder = tmp_path_factory.mktemp("measured")
    return {
        name: make_trainer(tiny_resnet(), config, folder).measure()[config.ft_type] for name, config in CONFIGS.items()
    }


def start(config, state):
    return set_up(equipped(tiny_resnet(), config), config, states={config.ft_type: state})


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_measured_is_accepted_and_what_was_damaged_is_not(name, measured):
    config, state = CONFIGS[name], measured[name]
    start(config, state)
    bad = [math.nan, math.inf] + ([] if name == "measured" else [1e30]) + ([-0.5] if name in NOT_NEGATIVE else [])
    for key, tensor in state.tensors.items():
        for value in bad if tensor.is_floating_point() else ():
            damaged = tensor.clone()
            damaged.view(-1)[-1] = value
            with pytest.raises(OptionError, match=f"state of {config.ft_type} is damaged.*'{key}'.*Measure again"):
                start(config, dataclasses.replace(state, tensors={**state.tensors, key: damaged}))


# Gates per channel could belong to another layer, which shows only when they are applied.
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"measured", "tred"}))
def test_a_state_of_another_shape_is_refused(name, measured):
    config, state = CONFIGS[name], measured[name]
    wider = {key: torch.cat((tensor, tensor)) if tensor.dim() else tensor for key, tensor in state.tensors.items()}
    with pytest.raises(OptionError, match="shape"):
        start(config, dataclasses.replace(state, tensors=wider))


def test_a_closed_gate_is_not_damage(measured):
    state = measured["tred"]
    logits = torch.full_like(state.tensors["logits"], -math.inf)
    start(CONFIGS["tred"], dataclasses.replace(state, tensors={**state.tensors, "logits": logits}))


@pytest.mark.parametrize("name", ["tred", "tred branches"])
def test_negative_variances_and_scales_and_another_disentangler_are_refused(name, measured):
    config, state = CONFIGS[name], measured[name]
    positive = [key for key in state.tensors if key == "scale" or key.endswith("running_var")]
    for key in positive:
        tensors = {**state.tensors, key: -torch.ones_like(state.tensors[key])}
        with pytest.raises(OptionError, match=f"'{key}' has values in"):
            start(config, dataclasses.replace(state, tensors=tensors))
    other = dataclasses.replace(config, disentangler="mask" if config.disentangler == "branches" else "branches")
    with pytest.raises(OptionError, match="consists of"):
        start(other, state)
    with pytest.raises(OptionError, match="has no module 'nowhere'"):
        start(config, dataclasses.replace(state, info={**state.info, "layer": "nowhere"}))


@pytest.mark.parametrize("rate", [math.nan, -0.1, 100.0, "fast", None])
def test_an_impossible_head_rate_is_refused(rate):
    with pytest.raises(OptionError, match="'head_lr' is"):
        start(LPFTConfig(), State(info={"head_lr": rate}))
    start(LPFTConfig(head_lr=0.1), State(info={"head_lr": rate}))


def test_a_damaged_state_in_a_checkpoint_is_named(tmp_path):
    config = CONFIGS["delta"]
    train(tiny_resnet(), config, tmp_path, save_strategy="steps", save_steps=4)
    checkpoint = tmp_path / "checkpoint-8"
    states = read_states(checkpoint)
    write_states(checkpoint, {"delta": State({name: a * math.nan for name, a in states["delta"].tensors.items()})})
    with pytest.raises(CheckpointError, match=f"{checkpoint / STATE_NAME}.*delta.*NaN.*another checkpoint"):
        train(tiny_resnet(), config, tmp_path, resume=True)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("info", ["[]", "3", "null", '{"l2_sp": 3}', '{"l2_sp": ' + DEEP + "}", DEEP, "{"])
def test_a_header_that_is_not_a_dictionary_is_damage(info, tmp_path):
    train(tiny_resnet(), "l2_sp", tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    save_file({}, tmp_path / "checkpoint-2" / STATE_NAME, metadata={"format": "pt", "info": info})
    with pytest.raises(CheckpointError, match=f"{STATE_NAME} is damaged"):
        read_states(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path).name == "checkpoint-1"
    for name in ("ft_config.json", "trainer_state.json"):
        (tmp_path / "checkpoint-1" / name).write_text(info)
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            last_checkpoint(tmp_path)
