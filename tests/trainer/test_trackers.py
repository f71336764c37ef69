"""What experiment trackers store for a run, read back from their files: the names that docs/trackers.md lists."""

import importlib.util

import pytest
from transformers.integrations import TensorBoardCallback

from hf_ft.errors import OptionError
from hf_ft.testing.models import tiny_resnet
from hf_ft.testing.training import make_trainer, tiny_data
from hf_ft.trainer import trackers
from hf_ft.trainer.trainer import FTTrainer
from tests.trackers import READERS, tracker

STRATEGY = ["lp_ft", "l2_sp"]
LOGGED = ("loss", "loss/task", "loss/l2_sp", "loss/l2_head", "learning_rate", "grad_norm", "stage")


def small():
    return tiny_resnet(depths=[1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_everything_is_in_one_tracked_run(name, tmp_path, monkeypatch):
    """Two stages with their own term; scores of the final model are logged after training."""
    read = tracker(name, tmp_path, monkeypatch)
    given = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "run_name": "named"}
    trainer = make_trainer(small(), STRATEGY, tmp_path / "out", report_to=name, **given)
    trainer.train()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    (run,) = read()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["stage"] for entry in logged] == [0, 0, 1, 1]
    for key in LOGGED:
        assert run.series(key) == pytest.approx([entry[key] for entry in logged]), key
    assert len(run.series("eval_loss")) == 3 and len(run.series("test_loss")) == 1
    assert run.options["strategy"] == "lp_ft+l2_sp" and float(run.options["l2_sp.alpha"]) == 0.01
    assert name == "tensorboard" or run.name == "named"


def test_the_range_of_rates_is_logged_if_there_are_several(tmp_path):
    """The rates of the update whose loss is logged, like the Trainer's own ``learning_rate``."""
    trainer = make_trainer(small(), "layer_decay", tmp_path, max_steps=2)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    rates = trainer.lr_scheduler.base_lrs
    assert len(set(rates)) > 2
    assert (first["learning_rate_min"], first["learning_rate_max"]) == (min(rates), max(rates))
    assert first["learning_rate"] == rates[0] == min(rates)
    assert second["learning_rate_max"] == pytest.approx(max(rates) / 2)


def test_unknown_or_missing_trackers_are_reported_before_training(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="report_to='tensorbord' is unknown"):
        trackers.check(["tensorbord"])
    find = importlib.util.find_spec
    missing = ("mlflow", "tensorboardX", "tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    for name in ("mlflow", "tensorboard"):
        with pytest.raises(ImportError, match=rf"report_to='{name}' needs {name}: pip install 'hf-ft\[{name}\]'"):
            make_trainer(small(), "full", tmp_path / "out", report_to=name)
    trackers.check("none")


def test_the_users_callbacks_stay(tmp_path):
    """Ours replace only those that the Trainer made for ``report_to``."""
    pytest.importorskip("tensorboard")
    own, model = TensorBoardCallback(), small()
    args = make_trainer(model, "full", tmp_path, report_to="tensorboard").args
    both = FTTrainer(model, args, train_dataset=tiny_data(model), callbacks=[own]).callback_handler.callbacks
    found = [callback for callback in both if isinstance(callback, TensorBoardCallback)]
    assert type(found[0]) is trackers.TensorBoard and found[1] is own and len(found) == 2
