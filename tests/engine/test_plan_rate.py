"""The base rate of a plan replaces the arguments' rate, for parameters and terms, in every stage."""

import pytest

from hf_ft import OptionError, Plan, Rate, Stage, compose
from hf_ft.engine.set_up import start
from hf_ft.testing import tiny_resnet


def test_rates_follow_the_base_rate_of_the_plan():
    stages = (
        Stage("head", trains=("classifier",), duration=0.5, rates=(Rate(("classifier",), lr=0.1),)),
        Stage("all", duration=0.5, rates=(Rate(("resnet.embedder",), scale=0.5),)),
    )
    model = tiny_resnet()
    run = start((), model, Plan(stages=stages, learning_rate=0.02), {})
    found = {group["stage_rates"] for group in run.param_groups(lr=7.0)}
    assert found == {(0.1, 0.02), (0.0, 0.02), (0.0, 0.01)}


def test_two_base_rates_conflict():
    one, other = Plan(learning_rate=0.1, owner="one"), Plan(learning_rate=0.2, owner="other")
    assert compose([Plan(), one]).learning_rate == 0.1 and compose([Plan()]).learning_rate is None
    with pytest.raises(OptionError, match=r"one \(0.1\) and other \(0.2\) each choose a learning rate"):
        compose([one, other])
