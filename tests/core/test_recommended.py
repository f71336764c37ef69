"""Recommended training arguments: which rate goes with which optimizer and which kind of network."""

import pytest

from hf_ft import (
    AutoStrategyConfig,
    BitFitConfig,
    DAFTConfig,
    FullConfig,
    L2SPConfig,
    LinearProbeConfig,
    LPFTConfig,
    PEFTConfig,
    SoftConfig,
    StockConfig,
    TREDConfig,
)
from hf_ft.core.compose import recommended_arguments
from hf_ft.core.config import config_class, strategies
from hf_ft.core.recommended import LearningRate
from hf_ft.strategies.auto.recipes import recommended_rate
from hf_ft.testing import tiny_resnet, tiny_vit
from hf_ft.testing.training import make_trainer

RATE = "learning_rate"


def rate(config, optim="adamw_torch", model=None):
    return recommended_arguments([config], optim, model)[RATE].value


@pytest.mark.parametrize(("optim", "value"), [("adamw_torch", 3e-4), ("adafactor", 3e-4), ("sgd", 3e-3)])
@pytest.mark.parametrize("config", [FullConfig(), L2SPConfig(), TREDConfig()])
def test_a_tenth_without_batch_norm(config, optim, value):
    assert rate(config, optim) == rate(config, optim, tiny_resnet()) == value
    assert rate(config, optim, tiny_vit()) == pytest.approx(value / 10, rel=1e-12)
    assert recommended_rate(config, optim, tiny_vit()) == rate(config, optim, tiny_vit())


@pytest.mark.parametrize("config", [FullConfig(), L2SPConfig(), LPFTConfig(), AutoStrategyConfig()])
def test_warm_up_without_batch_norm(config):
    assert recommended_arguments([config], model=tiny_vit())["warmup_steps"].value == 0.1
    assert "warmup_steps" not in recommended_arguments([config], "sgd", tiny_vit())
    assert "warmup_steps" not in recommended_arguments([config], model=tiny_resnet())
    assert "warmup_steps" not in recommended_arguments([config])


@pytest.mark.parametrize(
    ("configs", "wanted"),
    [
        ([FullConfig(norm_mode="eval")], True),
        ([L2SPConfig(norm_mode="eval")], True),
        ([FullConfig(norm_mode="train")], False),
        ([LPFTConfig()], False),  # it begins with a trained head
        ([SoftConfig()], True),
        ([SoftConfig(norm_mode="auto")], False),
        ([L2SPConfig(), SoftConfig()], True),
        ([DAFTConfig(), SoftConfig()], False),  # DAFT needs batch statistics
        ([PEFTConfig()], True),  # the layers that it adapts keep theirs
        ([LinearProbeConfig(norm_mode="eval")], False),  # the pretrained weights are frozen
    ],
)
def test_warm_up_where_statistics_are_kept(configs, wanted):
    assert ("warmup_steps" in recommended_arguments(configs, model=tiny_resnet())) is wanted
    assert "warmup_steps" not in recommended_arguments(configs, "sgd", tiny_resnet())


@pytest.mark.parametrize(("optim", "value"), [("adamw_torch", 2e-4), ("sgd", 3e-4)])
def test_lower_rates_where_statistics_are_kept(optim, value):
    for config in (FullConfig(norm_mode="eval"), L2SPConfig(norm_mode="eval"), SoftConfig()):
        assert rate(config, optim, tiny_resnet()) == value
        assert rate(config, optim, tiny_vit()) == rate(FullConfig(), optim, tiny_vit()), "it has no statistics"
    assert rate(LPFTConfig(), optim, tiny_resnet()) == rate(LPFTConfig(norm_mode="auto"), optim, tiny_resnet())


@pytest.mark.parametrize(("optim", "value"), [("adamw_torch", 1e-3), ("sgd", 3e-3)])
def test_a_family_of_networks_with_a_rate_of_its_own(optim, value):
    """Measured under AdamW only, and where the pretrained weights all train from the start."""
    model = tiny_resnet()
    model.config.model_type = "efficientnet"
    assert rate(FullConfig(), optim, model) == value
    assert rate(FullConfig(norm_mode="eval"), optim, model) == rate(FullConfig(norm_mode="eval"), optim)
    for config in (DAFTConfig(), LPFTConfig(), StockConfig()):
        assert rate(config, optim, model) == rate(config, optim, tiny_resnet())


@pytest.mark.parametrize("config", [PEFTConfig(), BitFitConfig(), StockConfig()])
def test_rates_for_few_parameters_and_of_other_strategies_stay(config):
    assert recommended_arguments([config], model=tiny_vit()) == recommended_arguments([config], model=tiny_resnet())


def test_what_is_fitted_is_not_multiplied():
    assert RATE not in recommended_arguments([LinearProbeConfig()], "sgd", tiny_vit())


@pytest.mark.parametrize("name", sorted(strategies()))
def test_rates_are_shown_as_people_write_them(name):
    wanted = config_class(name).recommended.get(RATE)
    for optim in ("sgd", "adamw_torch"):
        found = None if wanted is None else wanted.under(optim, batch_norm=False).value
        if isinstance(found, float):
            assert len(f"{found!r}") < 8
    wanted = LearningRate(
        3e-4, sgd=3e-3, without_batch_norm=0.1, kept=2e-4, kept_sgd=3e-4, families={"efficientnet": 1e-3}
    )
    assert str(wanted) == (
        "0.0003, 0.003 under SGD, 0.001 for efficientnet, times 0.1 without BatchNorm, 0.0002 (SGD: 0.0003) if "
        "norm_mode='eval'; under Adam, warmup_steps=0.1 without BatchNorm or if norm_mode='eval'"
    )


def test_an_unset_rate_warns_by_the_kind_of_network(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_ft.trainer.checks.logger.warning", said.append)
    make_trainer(tiny_vit(), "full", tmp_path, learning_rate=5e-5)
    assert "learning_rate=5e-05 (recommended: 3e-05, ours)" in said[0]
    assert "warmup_steps=0 (recommended: 0.1, ours: without batch statistics, the first steps of Adam" in said[0]
    make_trainer(tiny_vit(), "full", tmp_path, learning_rate=1e-5, warmup_steps=3)  # chosen by the user
    make_trainer(tiny_resnet(), L2SPConfig(norm_mode="eval"), tmp_path, learning_rate=2e-4, warmup_steps=0.1)
    assert len(said) == 1
    make_trainer(tiny_resnet(), L2SPConfig(norm_mode="eval"), tmp_path, learning_rate=2e-4)
    assert "warmup_steps=0 (recommended: 0.1, ours: without batch statistics" in said[1]
