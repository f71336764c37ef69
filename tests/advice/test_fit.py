"""The advice is fitted to finished comparisons, and no task evaluates an order that was fitted to it."""

import json
import random
from dataclasses import replace

import pytest

from docs.tools.evidence import fitted, kept_tasks
from hf_ft.advice.evidence import Evidence, Gain, shipped
from hf_ft.advice.fit import WORTHS, Task, advised_order, fit, judged_without, mean_gains
from hf_ft.advice.rules import neutral_order, recommend
from tests.advice.test_advice import signals

NAMES = ("full", "linear_probe", "lp_ft", "l2_sp", "daft", "bss")


def tasks(right: bool, number: int = 12) -> list[Task]:
    """Gains of two points per rule point, or uninformative points; the strategies are equal on average."""
    draw = random.Random(0)
    made = []
    for place in range(number):
        points = {name: float(draw.randint(-2, 2)) for name in NAMES}
        scores = {name: 0.8 + 0.02 * point * right + draw.gauss(0, 0.005) for name, point in points.items()}
        made.append(Task(str(place), scores, points))
    return made


def test_expected_gain_is_the_mean_shrunk_towards_that_of_all_strategies():
    evidence = Evidence({"full": Gain(0.0, 6), "daft": Gain(0.06, 6), "bss": Gain(-0.02, 1)}, worth=0.01)
    overall = (0.06 - 0.02) / 2
    assert evidence.expected("daft") == pytest.approx((6 * 0.06 + 2 * overall) / 8)
    assert evidence.expected("bss") == pytest.approx((-0.02 + 2 * overall) / 3)
    assert evidence.expected("tred") == pytest.approx(overall) and evidence.expected("full") == 0
    found = {one.strategy: one for one in recommend(signals(), evidence)}
    daft = found["daft"]
    assert daft.score == pytest.approx(evidence.expected("daft") + sum(reason.points for reason in daft.reasons[1:]))
    assert daft.reasons[0].text.startswith("over full fine-tuning it gained +6.0 points") and "6 tasks" in str(daft)
    assert "not compared yet" in found["tred"].reasons[0].text and "on 1 task" in found["bss"].reasons[0].text
    assert Evidence.from_dict(json.loads(json.dumps(evidence.to_dict()))) == evidence


def test_rules_that_are_right_get_a_weight_and_uninformative_ones_get_none():
    assert fit(tasks(right=True)).worth > 0
    assert fit(tasks(right=False)).worth == 0
    assert fit(tasks(right=True)[:1]).worth == 0 and fit([]).gains == {}
    order = advised_order(fit(tasks(right=True)), {"bss": 2.0, "full": -2.0})
    assert order.index("bss") < order.index("full")


def test_a_task_does_not_affect_the_order_that_it_evaluates():
    known = tasks(right=True)
    changed = [replace(known[0], scores=dict.fromkeys(NAMES, 0.5) | {"bss": 1.0}), *known[1:]]
    before, after = judged_without(known), judged_without(changed)
    assert before["0"] == after["0"] and any(before[name] != after[name] for name in before)


def test_tasks_from_the_same_data_are_held_out_together():
    known = tasks(right=True)
    sizes = [replace(known[0], data="photos"), replace(known[1], data="photos"), *known[2:]]
    for place in (0, 1):
        assert judged_without(sizes)[str(place)] == judged_without([sizes[place], *known[2:]])[str(place)]
    assert judged_without(sizes)["0"] != judged_without(known)["0"]


def test_gains_of_strategies_that_took_part_in_some_tasks_only():
    two = [
        Task("a", {"full": 0.5, "daft": 0.6}, {}),
        Task("b", {"full": 0.7, "daft": 0.6, "bss": 0.9}, {}),
    ]
    gains = mean_gains(two)
    assert gains["daft"] == Gain(pytest.approx(0.0), 2) and gains["bss"] == Gain(pytest.approx(0.2), 1)
    assert gains["full"] == Gain(0.0, 2)


def test_the_shipped_evidence_is_fitted_to_the_stored_comparisons():
    evidence = shipped()
    assert json.loads(fitted()) == evidence.to_dict() and evidence.worth in WORTHS
    assert len(kept_tasks()) >= 6 and set(evidence.gains) <= set(neutral_order())
