"""What experiment trackers store for a comparison: a run per training run, all in one place."""

import pytest
from transformers import TrainerCallback

from hf_ft.comparison.tracking import Tracked, run_name, tracking_of
from hf_ft.errors import OptionError
from tests.comparison.small_comparison import SHORT, load, run, splits
from tests.trackers import READERS, tracker


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_each_training_is_a_run(name, tmp_path, monkeypatch):
    read = tracker(name, tmp_path, monkeypatch)
    results = run(tmp_path / "photos", "l2_sp", trials=1, report_to=name, **SHORT)
    runs = {found.name: found for found in read()}
    assert sorted(runs) == ["full-seed-1", "full-trial-1", "l2_sp-seed-1", "l2_sp-trial-1"]
    if name == "tensorboard":
        assert {place.name for place in (tmp_path / "photos" / "tensorboard").iterdir()} == set(runs)
    if name == "mlflow":
        assert {(found.experiment, found.status) for found in runs.values()} == {("photos", "FINISHED")}
    for contender in results.contenders:
        for kind, training in (("trial-1", contender.trials[0]), ("seed-1", contender.runs[0])):
            found = runs[f"{contender.name}-{kind}"]
            (score,) = found.series("eval_best")
            assert score == pytest.approx(training.validation)
            assert found.options["strategy"] == contender.name
            assert bool(found.series("loss/l2_sp")) == (contender.name == "l2_sp")
            assert found.series("loss/task") and found.series(f"eval_{results.metric}")
            tested = found.series(f"test_{results.metric}")
            assert tested == pytest.approx([s[results.metric] for s in [training.scores.get("test")] if s])
    assert float(runs["l2_sp-trial-1"].options["l2_sp.alpha"]) == results["l2_sp"].trials[0].params["l2_sp.alpha"]


class Away(TrainerCallback):
    """A tracker whose server cannot be reached."""

    def on_log(self, *args, **kwargs):
        raise ConnectionError("refused")


class Noting(TrainerCallback):
    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged.append(logs)


def test_a_tracker_that_fails_ends_no_training(caplog):
    noting = Noting()
    with Tracked([Away(), noting]) as tracked:
        tracked.on_train_begin(None, None, None)
        for step in range(2):
            tracked.on_log(None, None, None, logs={"loss": step})
    assert noting.logged == [{"loss": 0}, {"loss": 1}] and len(tracked.trackers) == 1


def test_what_concerns_trackers_is_no_part_of_the_comparison(tmp_path):
    pytest.importorskip("tensorboard")
    given = {"report_to": "tensorboard", "project": "cells", "num_train_epochs": 2}
    tracking, others = tracking_of(given, tmp_path / "photos")
    assert others == {"num_train_epochs": 2} and tracking.report_to == ("tensorboard",)
    assert tracking.arguments("full-seed-1") == {"project": "cells", "run_name": "full-seed-1"}
    assert tracking_of({}, tmp_path / "photos")[0].project == "photos" and tracking.arguments("") == {}
    with pytest.raises(OptionError, match="report_to='tensorbord' is unknown"):
        run(tmp_path / "x", data=splits(), model=load(), report_to="tensorbord")
    assert not (tmp_path / "x").exists()


def test_names_of_runs_are_names_of_folders():
    assert run_name("lp_ft+l2_sp", "trial 3") == "lp_ft+l2_sp-trial-3"
    assert run_name("../my own", "seed 1", 1) == "-my-own-seed-1-fold-2"
