"""Learning rates and initial weights of composed strategies: they add up, or the strategies are refused by name."""

import pytest
from peft import LoraConfig

from hf_ft import (
    BlockwiseConfig,
    DAFTConfig,
    FullConfig,
    LayerDecayConfig,
    LPFTConfig,
    OptionError,
    PEFTConfig,
    State,
    set_up,
)
from hf_ft.core.compose import build_plan
from hf_ft.testing import tiny_resnet
from hf_ft.testing.training import make_trainer

HEAD, STEM = "classifier.1.weight", "resnet.embedder.embedder.convolution.weight"
FITTED = {name: State(info={"head_lr": 0.5, "curvature": 1.0, "feature_norm": 1.0}) for name in ("daft", "lp_ft")}


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


def test_a_rate_for_nothing_is_refused():
    """Adapters rename the layers: without an error, the decay would be lost."""
    with pytest.raises(OptionError, match=r"sets the learning rate of resnet\.embedder.*adapters"):
        rates(PEFTConfig(), LayerDecayConfig(), states={})


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


def test_plans_without_rates_are_unchanged():
    model = tiny_resnet()
    assert build_plan([LPFTConfig(head_lr=None)], model, {}).rates == ()
    assert [stage.rates for stage in build_plan([LPFTConfig(head_lr=None)], model, {}).stages] == [(), ()]
