"""``norm_mode`` is an option of every strategy: in all its stages, whatever it is composed with."""

import pytest
import torch

from hf_ft import (
    DAFTConfig,
    FullConfig,
    L2SPConfig,
    LinearProbeConfig,
    LPFTConfig,
    OptionError,
    SoftConfig,
    StochNormConfig,
)
from hf_ft.core.compose import build_plan
from hf_ft.testing import tiny_resnet, train


def statistics(model):
    return torch.cat([buffer.flatten() for name, buffer in model.named_buffers() if "running_mean" in name])


def modes(*configs):
    return [stage.norm_mode for stage in build_plan(configs, tiny_resnet(), {}).stages]


def test_a_probe_leaves_statistics_alone_unless_told_otherwise(tmp_path):
    start = statistics(tiny_resnet())
    assert torch.equal(statistics(train(tiny_resnet(), LinearProbeConfig(), tmp_path).model), start)
    moved = train(tiny_resnet(), LinearProbeConfig(norm_mode="train"), tmp_path).model
    assert not torch.equal(statistics(moved), start)
    frozen = [p for name, p in moved.named_parameters() if not name.startswith("classifier")]
    before = [p for name, p in tiny_resnet().named_parameters() if not name.startswith("classifier")]
    assert all(torch.equal(one, other) for one, other in zip(frozen, before, strict=True))


def test_the_mode_holds_in_all_stages():
    assert modes(LPFTConfig()) == ["auto", "eval"]
    assert modes(LPFTConfig(norm_mode="train")) == ["train", "train"]
    assert modes(FullConfig(norm_mode="eval")) == modes(FullConfig(norm_mode="eval", head_lr=0.1)) == ["eval"]


def test_what_is_set_for_one_strategy_holds_for_those_composed_with_it():
    daft = DAFTConfig(convert_batch_norm=False)
    assert modes(daft, L2SPConfig()) == ["auto"]
    assert modes(daft, L2SPConfig(norm_mode="eval")) == ["eval"]
    assert modes(daft, LPFTConfig()) == ["auto", "eval"]  # LP-FT's own default
    assert modes(DAFTConfig(convert_batch_norm=False, norm_mode="train"), LPFTConfig()) == ["train", "train"]
    assert modes(FullConfig(norm_mode="eval"), L2SPConfig()) == ["eval"]
    with pytest.raises(OptionError, match=r"full\.norm_mode='eval' and l2_sp\.norm_mode='train' conflict"):
        modes(FullConfig(norm_mode="eval"), L2SPConfig(norm_mode="train"))


def test_a_default_other_than_auto_gives_way_to_stages_and_to_what_needs_batch_statistics():
    soft = SoftConfig(weight=0.0)
    assert modes(soft) == modes(FullConfig(), soft) == modes(soft, L2SPConfig()) == ["eval"]
    assert modes(soft, LPFTConfig(norm_mode="train")) == ["train", "train"]
    assert modes(soft, LinearProbeConfig()) == ["auto"]
    assert modes(soft, DAFTConfig(convert_batch_norm=False)) == ["eval"]
    assert modes(soft, StochNormConfig()) == ["auto"]
    assert modes(SoftConfig(weight=0.0, norm_mode="auto")) == ["auto"]
    with pytest.raises(OptionError, match=r"soft\.norm_mode='auto' and l2_sp\.norm_mode='eval' conflict"):
        modes(SoftConfig(weight=0.0, norm_mode="auto"), L2SPConfig(norm_mode="eval"))
