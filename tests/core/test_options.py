"""Options added later: earlier work is still found under its old key."""

import pytest

from hf_ft import LinearProbeConfig, LPFTConfig
from hf_ft.core.config import strategies
from hf_ft.core.options import UNKNOWN, options


def test_an_option_added_later_is_no_part_of_the_identity_where_it_changes_nothing():
    assert "probe_solver" not in LinearProbeConfig().identity()
    assert LinearProbeConfig(probe_solver="lbfgs").identity()["probe_solver"] == "lbfgs"
    before = {"dropout": True, "fresh_optimizer": False}
    assert not before.keys() & LPFTConfig(**before).identity().keys()
    assert LPFTConfig().identity() == {**LPFTConfig(**before).identity(), "dropout": False, "fresh_optimizer": True}
    assert LPFTConfig().identity()["probe"] == 0.5


@pytest.mark.parametrize("name", strategies())
def test_what_was_done_before_is_a_value_of_the_option(name):
    kind = strategies()[name]
    added = {field.name: field.metadata["formerly"] for field in options(kind)}
    kind(**{option: value for option, value in added.items() if value is not UNKNOWN})  # raises if one is invalid
