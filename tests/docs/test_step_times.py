"""The comparison of step times covers the registry, and its floors agree with the strategies' plans."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from docs.tools import measured as docs_measured
from docs.tools import tables as docs_tables
from hf_ft import State
from hf_ft.core.compose import compose, resolve
from hf_ft.core.plan import stage_borders, stage_index, trained_by
from hf_ft.models.source_head import has_source_head
from hf_ft.testing import tiny_resnet
from hf_ft.testing.training import equipped

FOLDER = Path(__file__).parents[1] / "benchmarks"
LAST_MAP = "resnet.encoder.stages.3"
# Measurements before training, as far as they are needed to make a plan.
MEASURED = {
    "daft": ({"convert_batch_norm": False}, State()),
    "delta": ({"weights": "uniform"}, State()),
    "tred": ({"criterion": "none"}, State(info={"layer": LAST_MAP})),
    "co_tuning": ({}, State({"relationship": torch.full((2, 1000), 1e-3)})),
}


def _modules():
    sys.path.insert(0, str(FOLDER))
    try:
        import floors
        import step_times
        import stepper
    finally:
        sys.path.remove(str(FOLDER))
    return floors, step_times, stepper


floors, step_times, stepper = _modules()
STRATEGY_ROWS = [row for row in step_times.ROWS if row.strategy is not None]
WITH_FLOOR = [row for row in STRATEGY_ROWS if row.floor is not None]


def test_every_strategy_has_a_row_or_a_reason():
    names = {row.name.partition(":")[0] for row in step_times.ROWS}
    assert names | set(step_times.LEFT_OUT) >= set(docs_tables.documented())
    assert not names & set(step_times.LEFT_OUT)
    assert len({row.name for row in step_times.ROWS}) == len(step_times.ROWS)
    for row in STRATEGY_ROWS:
        (config,) = resolve(row.strategy)
        assert row.name.partition(":")[0] == config.ft_type


def test_a_strategy_that_is_added_appears_by_itself():
    (new,) = step_times.rows_of(["full", "added"])[len(step_times.ROWS) :]
    assert (new.name, new.strategy, new.floor) == ("added", "added", None)


@pytest.mark.parametrize("row", WITH_FLOOR, ids=lambda row: row.name)
def test_a_floor_is_what_the_plan_says(row, resnet):
    (config,) = resolve(row.strategy)
    changes, state = MEASURED.get(config.ft_type, ({}, State()))
    config = dataclasses.replace(config, **changes)
    model = row_model(row, resnet, config)
    plan = compose([config.plan(model, state)])
    model = with_adapters(model, plan)
    stage = plan.stages[stage_index(stage_borders(plan.stages, row.steps), row.at)]
    progress = row.at / row.steps
    terms = [t for t in plan.terms if t.weight * (t.schedule(progress) if t.schedule else 1.0)]

    trained = set(trained_by(stage, model, [name for name, p in model.named_parameters() if p.requires_grad]))
    adapters_only = bool(plan.surgery) and not any(".normalization." in name for name in trained)
    expected = {
        "trains": sum(p.numel() for name, p in model.named_parameters() if name in trained),
        "source_head": any(isinstance(getattr(t.fn, "head", None), torch.nn.Module) for t in terms),
        "references": int(any({"reference", "second_view"} & t.needs for t in terms) and not row.recorded),
        "batches": 1 + any(t.stream == "source" for t in terms),
        "norms": "eval" if stage.norm_mode == "eval" or adapters_only else "train",
        "recorded": row.recorded and "head" not in trained and row.floor.trains_from != "stem",
    }
    assert {
        "trains": row.floor.members * trained_weights(row.floor),
        "source_head": row.floor.source_head,
        "references": row.floor.references,
        "batches": row.floor.batches,
        "norms": row.floor.norms,
        "recorded": row.floor.recorded,
    } == expected
    assert row.floor.members == max(1, row.members)


@pytest.fixture(scope="module")
def resnet():
    return stepper.resnet18()


def with_adapters(model, plan):
    """A copy of the model with the plan's adapters, of which PEFT leaves only what trains trainable."""
    model = copy.deepcopy(model)
    for surgery in plan.surgery:
        model = surgery(model)
    return model


def trained_weights(floor):
    """How many weights one member of a floor trains, without a source head."""
    *body, head = list(floors.parts_of_resnet())[floors.FIRST_PART[floor.trains_from] :]
    chain = floors.trained(torch.nn.Sequential(*body), floor.trains)
    return sum(p.numel() for module in (chain, head) for p in module.parameters() if p.requires_grad)


def row_model(row, resnet, config):
    if row.members:
        return step_times.CollaborativeModel.from_members([stepper.resnet18() for _ in range(row.members)])
    if config.needs().source_head and not has_source_head(resnet):
        equipped(resnet, config, classes=1000)
    return resnet


@pytest.mark.parametrize("recorded", [False, True])
def test_a_floor_trains_what_it_says(recorded, monkeypatch):
    small = tiny_resnet(num_labels=2, hidden_sizes=[8, 8, 16, 16], depths=[2, 2, 2, 2])
    monkeypatch.setattr(floors, "resnet18", lambda: small)
    monkeypatch.setattr(stepper, "PIXELS", 32)
    floor = floors.FloorStepper(floors.Floor("stage3", recorded=recorded, source_head=True))
    (member,) = floor.members
    before = [p.detach().clone() for p in [*member.frozen.parameters(), *member.parameters()]]
    assert floor.step() > 0
    after = [*member.frozen.parameters(), *member.parameters()]
    frozen = len(list(member.frozen.parameters()))
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert frozen > 0 and not any(changed[:frozen])
    assert all(changed[frozen:])


@pytest.mark.parametrize("wrong", [{"trains_from": "neck"}, {"recorded": True}, {"batches": 2}])
def test_a_meaningless_floor_is_refused(wrong):
    with pytest.raises(ValueError, match=f"Floor.{next(iter(wrong))}="):
        floors.Floor(**wrong)


class Clock:
    """Takes steps of known lengths."""

    def __init__(self, seconds):
        self.seconds, self.steps = seconds, 0

    def step(self):
        self.steps += 1
        return self.seconds * self.steps


def test_ratios_are_of_the_same_round():
    one, other = Clock(1.0), Clock(3.0)
    seconds = stepper.in_turns((one, other), 5)
    assert (one.steps, other.steps) == (8, 8)  # three to warm up
    assert stepper.ratio(seconds[:, 1], seconds[:, 0]) == {"ratio": 3.0, "low": 3.0, "high": 3.0}
    spread = stepper.ratio(np.arange(1.0, 10.0), np.ones(9))
    assert spread["ratio"] == 5.0 and 1.0 < spread["low"] < 5.0 < spread["high"] < 9.0


def test_the_table_is_made_from_the_results(tmp_path, monkeypatch):
    about = {"pairs": 7, "torch": "2.0", "transformers": "5.0", "threads": 1, "geometry": "small"}
    ratio = {"ratio": 1.2345, "low": 1.2, "high": 1.3}
    rows = {
        "full": {"full": ratio, "floor": ratio, "peak_mb": 200.4},
        "other: live": {"full": ratio, "floor": None, "peak_mb": 50.1},
        "no memory": {"full": ratio, "floor": ratio},
    }
    content = {"about": about, "rows": rows, "left_out": {"third": "OptionError: why"}}
    (tmp_path / "step_times.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(docs_measured, "RESULTS", tmp_path)
    lines = docs_measured.table_of_step_times(docs_tables._table).splitlines()
    assert "| full | 1.234 (1.200 to 1.300) | 1.23 (1.20 to 1.30) | 200 MB | 1.00 |" in lines
    assert "| other: live | 1.234 (1.200 to 1.300) |  | 50 MB | 0.25 |" in lines
    assert "| no memory | 1.234 (1.200 to 1.300) | 1.23 (1.20 to 1.30) |  |  |" in lines
    assert "Left out: third (OptionError: why)." in lines
    assert "Rows whose peak memory is not measured yet: 1." in lines
    (tmp_path / "step_times.json").unlink()
    assert docs_measured.table_of_step_times(docs_tables._table) == docs_measured.NOT_YET


def test_the_page_names_every_row_far_above_its_floor():
    content = json.loads((FOLDER / "results" / "step_times.json").read_text(encoding="utf-8"))
    page = (docs_tables.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    said = page.partition("## Step times of all strategies")[2].partition("\n## ")[0]
    said = said.partition("<!-- end -->")[2]  # the text about the table
    above = [name for name, row in content["rows"].items() if row["floor"] and row["floor"]["ratio"] > 1.10]
    assert [name for name in above if f"`{name}`" not in said] == []
