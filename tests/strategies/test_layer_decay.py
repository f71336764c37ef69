"""Part l of 0 (stem) to L (head) trains at lr * decay^(L - l)."""

import pytest

from hf_ft import LayerDecayConfig, anatomy, set_up
from hf_ft.models.names import covers
from hf_ft.testing import tiny_resnet


def test_rate_of_each_part():
    model = tiny_resnet()
    groups = set_up(model, LayerDecayConfig(decay=0.5)).param_groups(lr=1.6)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    expected = {"stem": 0.1, "block0": 0.2, "block1": 0.4, "block2": 0.8, "head": 1.6}  # 1.6 / 2^(4 - l)
    parts = anatomy(model).parts
    assert [part.name for part in parts] == list(expected)
    for part in parts:
        for name, parameter in model.named_parameters():
            if any(covers(module, name) for module in part.modules):
                assert rates[id(parameter)] == pytest.approx(expected[part.name])
