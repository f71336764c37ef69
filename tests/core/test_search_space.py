"""Search spaces, and the points spread over them."""

import math

import numpy as np
import pytest

from hf_ft.core.config import strategies
from hf_ft.core.options import options
from hf_ft.core.search_space import Choice, FittedRate, LogRange, edges, spread, within
from hf_ft.errors import OptionError

SPACE = {"rate": LogRange(1e-5, 0.3), "mode": Choice(("a", "b", "c"))}


def test_a_share_of_a_logarithmic_range():
    part = LogRange(1e-4, 1e-2)
    assert part.at(0.0) == 1e-4 and part.at(0.5) == 1e-3
    assert part.at(0.3) == float(f"{1e-4 * 100**0.3:.4g}")


def test_points_cover_each_part_evenly():
    points = spread(SPACE, 32, seed=3)
    shares = [math.log(p["rate"] / 1e-5) / math.log(0.3 / 1e-5) for p in points]
    assert np.histogram(shares, bins=8, range=(0, 1))[0].tolist() == [4] * 8
    assert all(sum(p["mode"] == mode for p in points) in (10, 11, 12) for mode in "abc")


def test_a_longer_series_begins_with_the_shorter():
    for few, many in ((1, 2), (5, 9), (8, 31)):
        assert spread(SPACE, many, seed=1)[:few] == spread(SPACE, few, seed=1)
    assert spread(SPACE, 8, seed=1) != spread(SPACE, 8, seed=2)


def test_the_first_part_is_the_same_in_every_space():
    alone = spread({"rate": LogRange(1e-5, 0.3)}, 9, seed=0)
    assert [p["rate"] for p in alone] == [p["rate"] for p in spread(SPACE, 9, seed=0)]


def test_a_choice_that_changes_the_learning_rate():
    space = {"learning_rate": LogRange(1e-4, 1e-2), "mode": Choice(("a", "b"), rates=(1.0, 0.1))}
    plain = spread({"learning_rate": LogRange(1e-4, 1e-2), "mode": Choice(("a", "b"))}, 16, seed=0)
    for point, usual in zip(spread(space, 16, seed=0), plain, strict=True):
        factor = 0.1 if point["mode"] == "b" else 1.0
        assert point == {**usual, "learning_rate": pytest.approx(usual["learning_rate"] * factor, rel=1e-3)}
        assert within(space, point)["learning_rate"] == pytest.approx(usual["learning_rate"], rel=1e-3)
    assert {point["mode"] for point in plain} == {"a", "b"}
    assert edges(space, {"learning_rate": 1e-3, "mode": "b"}) == ["learning_rate"]  # the upper end of its range
    assert edges(space, {"learning_rate": 1e-3, "mode": "a"}) == edges(space, {"learning_rate": 1e-3}) == []


@pytest.mark.parametrize("rates", [(1.0,), (1.0, 0.1, 0.1), (1.0, 0.0), (1.0, -0.1)])
def test_rates_are_positive_and_one_for_each_value(rates):
    with pytest.raises(OptionError, match="a positive factor for each of the values"):
        Choice(("a", "b"), rates=rates)


def test_nothing_to_tune():
    assert spread({}, 3, seed=0) == [{}, {}, {}]
    assert spread(SPACE, 0, seed=0) == []


@pytest.mark.parametrize(("rate", "on_edge"), [(1.1e-5, True), (0.29, True), (1e-4, False), (0.05, False)])
def test_edges(rate, on_edge):
    assert edges(SPACE, {"rate": rate, "mode": "a"}) == (["rate"] if on_edge else [])


def test_edges_of_what_was_not_set():
    assert edges(SPACE, {"rate": None}) == []


@pytest.mark.parametrize("name", strategies())
def test_declared_spaces_are_for_options_and_within_their_ranges(name):
    config = strategies()[name]
    known = {field.name for field in options(config)} - {"head", "blocks"}
    assert set(config.tuned) <= known
    assert len(config.tuned) <= 2  # small: a few trials must cover it
    for option, part in config.tuned.items():
        part = part.around(0.01) if isinstance(part, FittedRate) else part
        for share in (0.0, 0.5, 1 - 1e-9):
            config(**{option: part.at(share)})  # raises if it is not allowed
