"""Who takes part: the form of a strategy that fits model and data."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_ft import (
    AutoStrategyConfig,
    BlockwiseConfig,
    DAFTConfig,
    FullConfig,
    L2SPConfig,
    LinearProbeConfig,
    LPFTConfig,
    RIFLEConfig,
    SoftConfig,
    TREDConfig,
)
from hf_ft.comparison.contenders import entrant
from hf_ft.comparison.settings import Settings
from hf_ft.core.compose import build_plan, recommended_arguments
from hf_ft.core.head_rate import HeadFit
from hf_ft.core.recommended import Recommended
from hf_ft.core.search_space import within
from hf_ft.engine.work import Work
from hf_ft.testing import tiny_resnet, tiny_vit


def entered(config, model):
    told = {"optims": ["sgd"], "metric": "accuracy", "epochs": 1.0, "model": model}
    return entrant(config.ft_type, [config], SimpleNamespace(source=None), Settings(), **told)


@pytest.mark.parametrize("convert", [True, False])
def test_without_batch_norm_daft_converts_none(convert):
    made = entered(DAFTConfig(convert_batch_norm=convert), tiny_vit())
    assert not made.configs[0].convert_batch_norm and not made.refusal
    assert made.notes == (("daft runs with convert_batch_norm=False to fit this model",) if convert else ())


def test_what_fits_runs_as_requested():
    made = entered(DAFTConfig(), tiny_resnet())
    assert made.configs[0].convert_batch_norm and not made.notes
    assert "source-free form" in entered(SoftConfig(), tiny_resnet()).notes[0]


@dataclass(frozen=True, kw_only=True)
class UnfitConfig(DAFTConfig):
    """It fits no model."""

    ft_type = "unfit"

    def adapted(self, model):
        return None


def test_what_has_no_form_for_the_model_is_refused():
    assert entered(UnfitConfig(), tiny_vit()).refusal == "unfit cannot run on this model: leave it out."


# --- what is tried


BOTH = ("adamw_torch", "sgd")
FIT = HeadFit(curvature=800.0, feature_spread=1000.0)


TOLD = {"metric": "accuracy", "epochs": 1.0, "model": tiny_resnet(), "head": lambda bench, name: None}


def with_head(*configs, optims=BOTH, fit=FIT, **settings):
    told = {"metric": "accuracy", "epochs": 1.0, "model": tiny_resnet(), "head": lambda bench, name: fit}
    return entrant("it", configs, SimpleNamespace(source=None), Settings(**settings), optims=optims, **told)


def test_the_first_trial_is_the_default_and_the_others_alternate_between_optimizers():
    found = with_head(DAFTConfig()).settings(8, seed=0)
    assert found[0] == {"optim": "adamw_torch", "learning_rate": 2e-4, "daft.head_lr": FIT.rate("adamw_torch")}
    assert [values["optim"] for values in found] == ["adamw_torch", "sgd"] * 4
    for values in found[1:]:
        centre = {"adamw_torch": 2e-4, "sgd": 2e-3}[values["optim"]]
        assert 1 / 5.6 < values["learning_rate"] / centre < 5.6
        assert 0.099 < values["daft.head_lr"] / FIT.rate(values["optim"]) < 3.01
    assert len({values["learning_rate"] for values in found}) == 8


@pytest.mark.parametrize("optims", [BOTH, ("sgd",)])
def test_fewer_trials_are_the_first_of_more(optims):
    """So the number of trials can be increased, and workers can share them."""
    made = with_head(DAFTConfig(), optims=optims)
    assert made.settings(5, seed=3) == made.settings(16, seed=3)[:5]
    assert made.settings(5, seed=3) != made.settings(5, seed=4)


def test_all_contenders_try_the_same_shares_of_their_ranges():
    def shares(made):
        found = []
        for values in made.settings(6, seed=0)[1:]:
            space = made.spaces[values["optim"]]
            rates, rate = space["learning_rate"], within(space, values)["learning_rate"]
            found.append(math.log(rate / rates.low) / math.log(rates.high / rates.low))
        return found

    assert shares(with_head(FullConfig())) == pytest.approx(shares(with_head(LPFTConfig())), abs=1e-3)


def test_the_recommended_optimizer_is_tried_first(monkeypatch):
    assert with_head(FullConfig()).first["optim"] == "adamw_torch"
    monkeypatch.setattr(L2SPConfig, "recommended", L2SPConfig.recommended | {"optim": Recommended("sgd")})
    assert with_head(L2SPConfig()).first["optim"] == "sgd"
    assert "optim" not in with_head(L2SPConfig(), optims=("adamw_torch",)).first


def test_a_probe_is_tried_around_the_rate_that_fits_its_head():
    made = with_head(LinearProbeConfig())
    assert made.first == {"optim": "adamw_torch", "learning_rate": FIT.rate("adamw_torch")}
    assert made.with_settings(made.first)[0].head_lr == "auto"  # which uses the given learning rate
    unknown = with_head(LinearProbeConfig(), fit=None)
    assert unknown.first["learning_rate"] == 1e-3 and not unknown.notes


def test_a_head_that_is_not_tuned_gets_the_rate_of_each_optimizer():
    made = with_head(BlockwiseConfig(block="stage1"), optims=BOTH)
    for optim in BOTH:
        chosen = made.with_settings({"optim": optim, "learning_rate": 1e-3})
        assert chosen[0].head_lr == FIT.rate(optim)
    fixed = with_head(DAFTConfig(head_lr=0.5))
    assert fixed.with_settings(fixed.settings(2, seed=0)[1])[0].head_lr == 0.5


def test_composed_strategies_share_the_rate_of_the_head():
    made = with_head(BlockwiseConfig(block="stage1"), DAFTConfig())
    assert [name for name in made.spaces["adamw_torch"] if "head_lr" in name] == ["blockwise.head_lr"]
    for values in made.settings(3, seed=0):
        rates = [config.head_lr for config in made.with_settings(values)]
        assert rates == [values["blockwise.head_lr"]] * 2
    for others in ([FullConfig()], [L2SPConfig()]):
        modes = with_head(*others, LPFTConfig())
        assert [name for name in modes.spaces["adamw_torch"] if "norm_mode" in name] == ["lp_ft.norm_mode"]
        tried = [build_plan(modes.with_settings(values), tiny_resnet(), {}) for values in modes.settings(8, seed=0)]
        assert {plan.stages[-1].norm_mode for plan in tried} == {"auto", "eval"}
    fixed = with_head(BlockwiseConfig(block="stage1", head_lr=None), DAFTConfig())
    assert [name for name in fixed.spaces["adamw_torch"] if "head_lr" in name] == ["daft.head_lr"]
    assert [config.head_lr for config in fixed.with_settings(fixed.first)] == [None, FIT.rate("adamw_torch")]


@pytest.mark.parametrize("config", [DAFTConfig(), FullConfig()])
def test_rates_of_the_user_hold_for_all(config):
    made = with_head(config, learning_rates="1e-3,1e-2")
    assert made.first["learning_rate"] == 1e-3
    assert all(1e-3 <= values["learning_rate"] <= 1e-2 for values in made.settings(8, seed=0))


@pytest.mark.parametrize(
    ("config", "default", "shown"),
    [
        (FullConfig(), "auto", "auto, eval (lr x 0.667) (adamw_torch); auto, eval (lr x 0.1) (sgd)"),
        (SoftConfig(weight=0.0), "eval", "auto (lr x 1.5), eval (adamw_torch); auto (lr x 10), eval (sgd)"),
    ],
)
def test_statistics_are_kept_at_the_rate_recommended_for_that(config, default, shown):
    name = f"{config.ft_type}.norm_mode"
    made = with_head(config)
    modes = {values[name] for values in made.settings(8, seed=0)}
    assert modes == {"auto", "eval"} and made.first[name] == default
    for values in made.settings(8, seed=0):
        mode, optim = values[name], values["optim"]
        centre = {"auto": {"adamw_torch": 3e-4, "sgd": 3e-3}, "eval": {"adamw_torch": 2e-4, "sgd": 3e-4}}[mode][optim]
        assert 1 / 5.6 < values["learning_rate"] / centre < 5.6
    assert made.described_space()[name] == shown


def test_a_default_mode_that_gives_way_to_stages_neither_is_tuned_nor_determines_the_rate():
    made = with_head(SoftConfig(weight=0.0), RIFLEConfig())
    assert "soft.norm_mode" not in made.first and made.first["rifle.norm_mode"] == "auto"
    assert made.first["learning_rate"] == 3e-4
    assert "warmup_steps" not in recommended_arguments(made.configs, "adamw_torch", tiny_resnet())
    modes = {
        build_plan(made.with_settings(v), tiny_resnet(), {}).stages[-1].norm_mode for v in made.settings(8, seed=0)
    }
    assert modes == {"auto", "eval"}


def test_norm_mode_is_not_tuned_without_batch_norm():
    told = TOLD | {"model": tiny_vit()}
    made = entrant("it", [FullConfig()], SimpleNamespace(source=None), Settings(), optims=BOTH, **told)
    assert list(made.spaces["sgd"]) == ["learning_rate"]
    assert "full.norm_mode" in with_head(FullConfig(), TREDConfig()).spaces["sgd"]
    assert "tred.norm_mode" in with_head(TREDConfig()).spaces["sgd"]
    assert "tred.norm_mode" not in with_head(DAFTConfig(), TREDConfig()).spaces["sgd"]  # DAFT needs batch statistics


def test_what_chooses_its_own_rate_is_tried_once():
    made = with_head(AutoStrategyConfig(), learning_rates="1e-3,1e-2")
    assert made.settings(8, seed=0) == [{}] and list(made.spaces) == ["adamw_torch"]
    assert made.optim({}) == "adamw_torch" and made.configs[0].storage == "memory" and not made.refusal


# --- work


def test_work_is_counted_and_changes_nothing():
    def trained(work):
        torch.manual_seed(0)
        model, data = nn.Linear(6, 3), torch.rand(5, 6)
        with work or nullcontext():
            model(data).sum().backward()
        return model.weight.grad

    first, again = Work(), Work()
    gradients = [trained(work) for work in (first, again, None)]
    assert first.total == again.total == 2 * 5 * 6 * 3 * 2  # forward, and backward only to the weights
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
