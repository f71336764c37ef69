"""Every strategy keeps every law, and trains under bfloat16 autocast."""

import functools
import math

import pytest

from docs.tools.tables import documented
from hf_ft.testing import LAWS, suited, tiny_bert, tiny_resnet, tiny_vit, train

# Searches and measurements of the default length would take most of the time, and show no more.
OPTIONS = {
    "blockwise": {"search_epochs": 1, "storage": "memory", "baselines": False},
    "amcf": {"search_epochs": 1, "storage": "memory", "particles": 2, "iterations": 1},
    "auto": {"choose_from": ("lp_ft",), "storage": "memory"},
    "tred": {"epochs": 3},
    "delta": {"head_epochs": 1, "batches": 2},
}
TRAINING = ("accumulation_changes_nothing", "resume_changes_nothing", "plain_reload", "mixed_images_train")
# Each on one of a strategy's models, a different one per law; the other laws on all of them.
IN_TURN = (*TRAINING, "weightless_terms_change_nothing", "term_order_is_irrelevant", "frozen_stays_frozen")
IN_TURN += ("config_round_trip", "out_of_range_raises")  # which depend on the model only for its form
SEARCHING = ("auto", "blockwise", "amcf", "tred")


@functools.cache
def fitting():
    """Strategies with the models for which they have a form."""
    models = {make: make() for make in (tiny_resnet, tiny_vit, tiny_bert)}
    kinds = documented().items()
    return [(name, make) for name, kind in kinds for make, model in models.items() if kind().adapted(model) is not None]


def pairs(slow=()):
    return [
        pytest.param(name, make, marks=pytest.mark.slow if name in slow else (), id=f"{name}-{make.__name__}")
        for name, make in fitting()
    ]


def in_turn(first=0):
    """Every strategy with one of its models, each equally often; a different one for a different ``first``."""
    by_name = {}
    for name, make in fitting():
        by_name.setdefault(name, []).append((name, make))
    return [options[(first + place) % len(options)] for place, options in enumerate(by_name.values())]


def check(name, make, law, folder):
    config = documented()[name](**OPTIONS.get(name, {}))
    LAWS[law](suited(config, make()), make, folder)


@pytest.mark.parametrize("law", [law for law in LAWS if law not in IN_TURN])
@pytest.mark.parametrize(("name", "make"), pairs(SEARCHING))
def test_law(name, make, law, tmp_path):
    check(name, make, law, tmp_path)


def laws_in_turn():
    for turn, law in enumerate(IN_TURN):
        for name, make in in_turn(turn):
            slow = law in TRAINING or name in SEARCHING
            yield pytest.param(name, make, law, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("name", "make", "law"), laws_in_turn())
def test_law_in_turn(name, make, law, tmp_path):
    check(name, make, law, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make"), in_turn())
def test_bfloat16_autocast(name, make, tmp_path):
    config = documented()[name](**OPTIONS.get(name, {}))
    trainer = train(make(), suited(config, make()), tmp_path, bf16=True, max_steps=4, learning_rate=1e-3)
    losses = [value for entry in trainer.state.log_history for key, value in entry.items() if key.startswith("loss")]
    assert losses and all(map(math.isfinite, losses))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
