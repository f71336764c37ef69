"""A run ends after some evaluations without a better score, in one piece or resumed, and stays ended."""

import pytest
from transformers import EarlyStoppingCallback

from hf_ft import OptionError
from hf_ft.testing import same_tensors, tiny_resnet
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments
from hf_ft.trainer.patience import patience_callback
from tests.comparison.small_comparison import run
from tests.trainer.test_resume import Steps

WATCHED = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 20}
WATCHED |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1e-12}
WATCHED |= {"restore_callback_states_from_checkpoint": True, "greater_is_better": True}  # falling losses do not count


def trainer(folder, patience=2):
    made = make_trainer(tiny_resnet(), "linear_probe", folder, **WATCHED)
    made.add_callback(patience_callback(patience, made.args))
    made.add_callback(steps := Steps())
    return made, steps


def test_it_ends_and_a_resumed_run_ends_where_it_would_have(tmp_path):
    whole, steps = trainer(tmp_path)
    whole.train()
    assert steps.taken == whole.state.global_step < 20
    last = whole.state.global_step
    again, steps = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert steps.taken == 0 and again.state.global_step == last
    same_tensors(snapshot(again.model), snapshot(whole.model))
    earlier, steps = trainer(tmp_path / "again")
    earlier.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last - 2}"))
    assert steps.taken == 2 and earlier.state.global_step == last


@pytest.mark.parametrize(
    ("patience", "more", "message"),
    [(0, {}, "patience=0"), (2, {"load_best_model_at_end": False}, "load_best_model_at_end is False")],
)
def test_refused(patience, more, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        patience_callback(patience, tiny_arguments(tmp_path, **{**WATCHED, **more}))


@pytest.mark.slow
def test_a_comparison_ends_runs_and_reports_it(tmp_path):
    results = run(tmp_path, trials=0, seeds=1, num_train_epochs=6, patience=1)
    assert results.settings["patience"] == 1
    for contender in results.contenders:
        for training in contender.runs:
            best = max(range(len(training.curve)), key=lambda i: training.curve[i]["validation"])
            assert len(training.curve) == min(6, best + 2) and training.share == len(training.curve) / 6
    assert any(len(one.runs[0].curve) < 6 for one in results.contenders)
    assert "patience" in (tmp_path / "report.md").read_text()
    assert isinstance(patience_callback(1, tiny_arguments(tmp_path, **WATCHED)), EarlyStoppingCallback)
