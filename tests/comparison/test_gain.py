"""What the winner gained, and how certain that is."""

import numpy as np
import pytest

from hf_ft.cli.compare import _gained
from hf_ft.comparison.gain import gain
from hf_ft.comparison.results import Results
from tests.comparison.report import made_up_results


def test_the_gain_is_that_of_the_predictions():
    results = Results.from_dict(made_up_results.comparison())
    assert results.winner not in ("", "full")
    labels = np.asarray(results.labels["test"])

    def score(name):
        runs = [np.asarray(run.predictions["test"]) == labels for run in results[name].finished_runs]
        return np.mean([[right[labels == c].mean() for c in np.unique(labels)] for right in runs])

    difference, error = gain(results)
    assert difference == pytest.approx(score(results.winner) - score("full"))
    assert 0.0 < error < 0.1


def test_no_gain_where_full_fine_tuning_wins_or_no_error_where_none_is_known():
    assert gain(Results.from_dict(made_up_results.smallest())) is None
    content = made_up_results.comparison(seeds=1)
    content["metric"] = "macro_f1"
    for contender in content["contenders"]:
        for run in contender["runs"]:
            for scores in run["scores"].values():
                scores["macro_f1"] = scores["balanced_accuracy"]
    difference, error = gain(Results.from_dict(content))
    assert difference is not None and error is None


def test_gain_over_a_strategy_other_than_full_fine_tuning():
    results = Results.from_dict(made_up_results.comparison())
    scores = {one.name: [run.scores["test"][results.metric] for run in one.finished_runs] for one in results.contenders}
    assert results.winner == "daft"
    for over in ("linear_probe", "full"):
        mean, error = gain(results, over)
        assert mean == pytest.approx(np.mean(scores["daft"]) - np.mean(scores[over])) and 0 < error < 0.05
        assert f"minus that of {'full fine-tuning' if over == 'full' else over}: +" in _gained(results, over)
    assert gain(results, "daft") is None and gain(results, "nobody") is None
    assert "over daft: no strategy" in _gained(results, "daft")
    assert _gained(results, "nobody") == _gained(results, "full")
