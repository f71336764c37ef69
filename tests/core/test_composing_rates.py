"""Learning rates and initial weights of composed strategies: they add up, or the strategies are refused by name."""

import re
import sys

import pytest
from peft import LoraConfig

from hf_ft import (
    AutoRGNConfig,
    BlockwiseConfig,
    ChildTuningConfig,
    DAFTConfig,
    FullConfig,
    GradualUnfreezingConfig,
    L2SPConfig,
    LayerDecayConfig,
    LPFTConfig,
    OptionError,
    PEFTConfig,
    State,
    StochNormConfig,
    set_up,
)
from hf_ft.core import Plan, Rate
from hf_ft.core.compose import build_plan, compose
from hf_ft.engine.param_groups import split_groups
from hf_ft.testing import tiny_resnet
from hf_ft.testing.training import make_trainer

HEAD, STEM = "classifier.1.weight", "resnet.embedder.embedder.convolution.weight"
FITTED = {name: State(info={"head_lr": 0.5, "curvature": 1.0, "feature_spread": 1.0}) for name in ("daft", "lp_ft")}


def rates(*configs, states=FITTED):
    """The rates of the head and of the stem in each stage, for a base rate of 1."""
    run = set_up(model := tiny_resnet(), list(configs), states=states)
    groups = {id(p): group["stage_rates"] for group in run.param_groups(lr=1.0) for p in group["params"]}
    return [groups[id(model.get_parameter(name))] for name in (HEAD, STEM)]


def daft(**options):
    return DAFTConfig(convert_batch_norm=False, zero_head=False, **options)


def test_rates_hold_in_the_stages_of_another_strategy():
    assert rates(daft(head_lr=0.1)) == [(0.1,), (1.0,)]
    assert rates(LPFTConfig(head_lr=None), daft(head_lr=0.1)) == [(0.1, 0.1), (0.0, 1.0)]
    assert rates(LPFTConfig(head_lr=None), FullConfig(head_lr=0.1)) == [(0.1, 0.1), (0.0, 1.0)]
    assert rates(LPFTConfig(), LayerDecayConfig(decay=0.5)) == [(0.5, 1.0), (0.0, 1 / 16)]
    assert rates(daft(), LayerDecayConfig(decay=0.5)) == [(0.5,), (1 / 16,)]


@pytest.mark.parametrize("order", [1, -1])
def test_equal_rates_are_no_conflict(order):
    assert rates(*[LPFTConfig(), daft()][::order]) == [(0.5, 0.5), (0.0, 1.0)]
    assert rates(*[daft(), FullConfig(head_lr=0.5)][::order]) == [(0.5,), (1.0,)]


@pytest.mark.parametrize("order", [1, -1])
def test_different_rates_are_refused(order):
    for pair in ([LPFTConfig(), daft(head_lr=0.1)], [daft(), FullConfig(head_lr=0.1)]):
        with pytest.raises(OptionError, match=r"both set the learning rate of 'classifier'.*head_lr=None"):
            rates(*pair[::order])
    assert rates(*[LPFTConfig(), daft(head_lr=None)][::order]) == [(0.5, 1.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (LayerDecayConfig(), "learning rates"),
        (FullConfig(head_lr=0.1), "learning rates"),
        (AutoRGNConfig(), "learning rates"),
        (ChildTuningConfig(), "gradients"),
    ],
)
@pytest.mark.parametrize("adapting", [PEFTConfig(), BlockwiseConfig(tuner=LoraConfig(r=2))])
def test_what_names_layers_that_adapters_rename_is_refused(adapting, other, what, tmp_path):
    """It would be lost."""
    with pytest.raises(OptionError, match=f"{other.ft_type} sets {what} of layers to which {adapting.ft_type} adds"):
        make_trainer(tiny_resnet(), [adapting, other], tmp_path)
    make_trainer(tiny_resnet(), [adapting, ChildTuningConfig(mode="F")], tmp_path)  # names none


def test_a_rate_for_nothing_is_refused():
    wrong = Plan(rates=(Rate(("backbone",), lr=0.1),))
    with pytest.raises(OptionError, match="sets the learning rate of backbone, which the model does not have"):
        split_groups([], tiny_resnet(), compose([wrong]), ())


@pytest.mark.parametrize("order", [1, -1])
def test_a_fitted_head_is_not_zeroed(order, tmp_path):
    fitted = LPFTConfig(probe_solver="lbfgs")

    def plan(**options):
        trainer = make_trainer(tiny_resnet(), [fitted, DAFTConfig(**options)][::order], tmp_path)
        return trainer._start_run().plan

    with pytest.raises(OptionError, match=r"both set the initial weights of classifier\.1.*zero_head=False"):
        plan()
    assert len(plan(zero_head=False).surgery) == 2


@pytest.mark.parametrize("other", [PEFTConfig(), BlockwiseConfig(block="stage1", tuner=LoraConfig(r=2))])
def test_daft_and_adapters(other):
    with pytest.raises(OptionError, match=f"daft changes layers of the model, and {other.ft_type} adds adapters"):
        make_trainer(tiny_resnet(), [other, DAFTConfig()], "unused")


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([BlockwiseConfig(), LPFTConfig()], "blockwise and lp_ft both decide which parameters train when"),
        ([BlockwiseConfig(), DAFTConfig(head_lr=0.1)], "blockwise and daft both set the learning rate"),
        ([DAFTConfig(), GradualUnfreezingConfig()], "gradual_unfreezing and daft both set the learning rate"),
        ([DAFTConfig(), FullConfig(head_lr=0.1)], "daft and full both set the learning rate"),
        ([DAFTConfig(head_lr=0.1), DAFTConfig(head_lr=0.3)], "daft is given twice: use one config"),
    ],
)
def test_conflicts_are_found_before_anything_is_measured(configs, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        make_trainer(tiny_resnet(), configs, tmp_path)


@pytest.mark.parametrize("order", [1, -1])
def test_common_options_hold_for_all(order, tmp_path, monkeypatch):
    """Candidates of a search train as the run will."""
    searched = []
    monkeypatch.setattr(BlockwiseConfig, "search", lambda self, *given: searched.append(self) or 1 / 0)
    configs = [BlockwiseConfig(), DAFTConfig(norm_mode="eval", batch_norm_momentum=0.5, head="classifier.1")][::order]
    with pytest.raises(ZeroDivisionError):
        make_trainer(tiny_resnet(), configs, tmp_path).measure()
    assert (searched[0].norm_mode, searched[0].batch_norm_momentum, searched[0].head) == ("eval", 0.5, "classifier.1")
    assert rates(*[LPFTConfig(head_lr=0.1), daft(head="classifier.1", head_lr=0.1)][::order]) == [
        (0.1, 0.1),
        (0.0, 1.0),
    ]


@pytest.mark.parametrize(
    ("configs", "warned"),
    [
        ([DAFTConfig(), LPFTConfig()], "daft: BatchNorm keeps .*no effect.*norm_mode='auto' in lp_ft"),
        ([StochNormConfig(), FullConfig(norm_mode="eval")], "stoch_norm: BatchNorm keeps .*no effect.*in stoch_norm"),
        ([DAFTConfig(), LPFTConfig(norm_mode="auto")], None),
        ([DAFTConfig()], None),
    ],
)
def test_what_statistics_kept_make_useless_is_told(configs, warned, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(sys.modules["hf_ft.core.compose"].logger, "warning_once", said.append)
    make_trainer(tiny_resnet(), configs, tmp_path).measure()
    assert bool(said) is bool(warned) and all(re.search(warned or "", one) for one in said)


def test_plans_without_rates_are_unchanged():
    model = tiny_resnet()
    assert build_plan([LPFTConfig(head_lr=None)], model, {}).rates == ()
    assert [stage.rates for stage in build_plan([LPFTConfig(head_lr=None)], model, {}).stages] == [(), ()]


def test_two_terms_of_one_name_are_refused():
    plans = [L2SPConfig(alpha=alpha).plan(tiny_resnet(), State()) for alpha in (0.1, 0.2)]
    with pytest.raises(OptionError, match="two strategies add a term named"):
        compose(plans)
