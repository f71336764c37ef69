"""``hf_ft.compare``: equal budgets, which data are used for what, interruptions, failures."""

import base64
import errno
import json
import os
import shutil
import time
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.numpy import load_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoImageProcessor, AutoModelForImageClassification, EvalPrediction
from transformers.training_args import OptimizerNames

from hf_ft import (
    BlockwiseConfig,
    FTConfig,
    FullConfig,
    L2SPConfig,
    LPFTConfig,
    OptionError,
    Plan,
    SoftConfig,
    State,
    Term,
    WiSEFTConfig,
)
from hf_ft.comparison import Data, Results, Training
from hf_ft.comparison.contenders import Entrant, chosen_strategies
from hf_ft.comparison.cost import Clock, PeakMemory
from hf_ft.comparison.folder import Kept
from hf_ft.comparison.ledger import Done, Ledger, Planned
from hf_ft.comparison.prepare import batch_size, prepare_comparison
from hf_ft.comparison.runner import Runner
from hf_ft.comparison.settings import Settings, optimizers, training_arguments, under
from hf_ft.comparison.task import Bench
from hf_ft.comparison.training import finite_metrics, train
from hf_ft.core.compose import recommended_arguments
from hf_ft.core.config import _CONFIGS, register
from hf_ft.core.search_space import LogRange
from hf_ft.data.columns import find_columns
from hf_ft.errors import MachineError
from hf_ft.inference import load_trained, predict
from hf_ft.search.claims import Claims
from hf_ft.search.storage import open_storage
from hf_ft.search.study import as_json, open_study
from hf_ft.search.trials import Job, run_trials
from tests.comparison.small_comparison import NAMES, SHORT, any_temperature, lasting, load, run, splits
from tests.forked import python


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Three strategies, one of which is a composition of two; with out-of-distribution data and a wrong label."""
    folder = tmp_path_factory.mktemp("compared")
    told = []
    data = splits(ood=(5, 5, 5))
    test, (first, *others) = data["test"], data["test"]["label"][:]
    labels = [(first + 1) % len(NAMES), *others]
    data["test"] = test.remove_columns("label").add_column("label", labels).cast(test.features)
    with any_temperature():
        return run(folder, "linear_probe,lp_ft+l2_sp", data=data, told=told.append), folder, data, told


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of a short, uninterrupted comparison."""
    return lasting(run(tmp_path_factory.mktemp("whole"), **SHORT))


@pytest.mark.slow
def test_every_contender_is_tuned_and_then_runs_with_each_seed(compared):
    results = compared[0]
    assert [contender.name for contender in results.contenders] == ["full", "linear_probe", "lp_ft+l2_sp"]
    for contender in results.contenders:
        assert contender.status == "finished" and not contender.reason
        assert [run.seed for run in contender.runs] == [1, 2]
        assert all(trial.seed == 0 for trial in contender.trials)
        best = max(contender.trials, key=lambda trial: trial.validation)
        mean = [np.mean([run.validation for run in runs]) for runs in (contender.runs, contender.rejected) if runs]
        assert len(mean) == 1 or mean[0] >= mean[1]
        assert contender.trials[contender.chosen].validation == best.validation or contender.chosen == 0 < len(mean) - 1
        assert all(run.params == contender.trials[contender.chosen].params for run in contender.runs)


@pytest.mark.slow
def test_only_final_runs_use_the_test_sets(compared):
    results, _, data, _ = compared
    for contender in results.contenders:
        assert all(not trial.scores and not trial.predictions for trial in contender.trials)
        for final in contender.runs:
            assert set(final.scores) == {"validation", "test", "ood"}
            for split in ("test", "ood"):
                labels = np.asarray(data[split]["label"][:])
                accuracy = np.mean(np.asarray(final.predictions[split]) == labels)
                assert final.scores[split]["accuracy"] == pytest.approx(accuracy)
            assert final.scores["validation"]["balanced_accuracy"] == final.validation


@pytest.mark.slow
def test_the_budget_is_the_work_of_full_fine_tuning(compared):
    results = compared[0]
    assert results["full"].used == 1.0 and len(results["full"].trials) == 2
    assert 0.0 < results["linear_probe"].used < 0.9 and len(results["linear_probe"].trials) == 2


def known_ledger(cost, looking=0.0, shares=None, most=4):
    """Full fine-tuning with four units of work, and another contender; trials with a share are finished."""

    class Known(Ledger):
        def settings_of(self, entrant):
            return [{}] * (8 * most)

        def trial(self, entrant, number):
            if entrant == "full":
                return Done(Training(0, {}, 0.5), 0.0, work=4.0)
            if number and (shares is None or number >= len(shares)):
                return None
            share = 1.0 if shares is None else shares[number]
            return Done(Training(0, {}, 0.5, share=share), 0.0, measured_work=looking, work=cost * share)

    return Known(("full", "other"), Settings(trials=8, most_trials=most), True)


@pytest.mark.parametrize(
    ("cost", "looking", "trials"),
    [(4.0, 0.0, 8), (8.0, 0.0, 4), (8.5, 0.0, 3), (4.0, 17.0, 3), (0.1, 0.0, 32), (50.0, 0.0, 1)],
)
def test_how_many_trials_fit(cost, looking, trials):
    """With a budget of eight training runs of four units; at most four times as many, and at least one."""
    ledger = known_ledger(cost, looking)
    assert ledger.trials_of("full") == 8
    assert ledger.trials_of("other") == trials


class Alone:
    """A contender of three settings."""

    def settings(self, most, seed):
        return [{"rate": number} for number in range(3)]

    def key(self, *parts):
        return str(parts)


def confirmed(again, trials=(0.6, 0.7, 0.8), seeds=3, folds=1, greater=True):
    """A ledger with three trials, and with runs of the best one and of the defaults whose scores are ``again``."""
    alone = Alone()
    ledger = Ledger([alone], Settings(trials=3, seeds=seeds, folds=folds), greater)
    for number, score in enumerate(trials):
        planned = Planned(alone, "trial", number, number)
        ledger.done[ledger.key(planned)] = Done(Training(0, {}, score), 0.0, work=1.0)
    for planned, score in zip(ledger.confirming(alone), again, strict=False):
        ledger.done[ledger.key(planned)] = Done(Training(planned.seed, {}, score), 0.0)
    return ledger, alone


def test_the_best_trial_is_confirmed_against_the_defaults():
    ledger, alone = confirmed([])
    assert [(run.setting, run.seed) for run in ledger.confirming(alone)] == [(2, 1), (2, 2), (0, 1), (0, 2)]
    assert ledger.best_trial(alone) == 2 and ledger.chosen(alone) is None and not ledger.runs(alone)
    for again, chosen in (
        ([0.75, 0.6, 0.6, 0.7], 2),
        ([0.6, 0.6, 0.6, 0.7], 0),
        ([0.65, 0.65, 0.6, 0.7], 2),  # equal
        ([None, 0.9, 0.6, 0.7], 0),  # one failed
        ([None, None, None, 0.7], 2),  # nothing to go by
    ):
        ledger, alone = confirmed(again)
        assert ledger.chosen(alone) == chosen
        assert not ledger.complete and len(ledger.runs(alone)) == 2  # the third seed is still missing
        assert [run.validation for run in ledger.rejected(alone)] == (again[2:] if chosen else again[:2])
    assert confirmed([0.6, 0.6, 0.6])[0].chosen(alone) is None
    assert confirmed([0.6, 0.6, 0.6, 0.7], trials=(0.8, 0.7, 0.6), greater=False)[0].chosen(alone) == 2


def test_what_needs_no_confirmation():
    for case in ({"trials": (0.8, 0.7, 0.6)}, {"folds": 5}):
        ledger, alone = confirmed([], **case)
        assert not ledger.confirming(alone) and ledger.chosen(alone) == ledger.best_trial(alone)
    ledger, alone = confirmed([0.6, 0.7], seeds=1)
    assert ledger.chosen(alone) == 0 and ledger.complete


@pytest.mark.parametrize(
    ("shares", "trials"),
    [
        ([0.25], 8),  # the first diverged: the work of a whole training run is known nevertheless
        ([1.0] * 7, 8),
        ([1.0] * 8, 8),
        ([1.0, *[0.25] * 4, 1.0, 1.0, 1.0], 11),  # four that left three quarters of their work each
        ([1.0, *[0.25] * 4, 1.0, 1.0, 1.0, 0.5, 0.5, 1.0], 12),  # and of those three, two left half
        ([0.1] * 32, 32),
    ],
)
def test_what_diverged_trials_leave_is_used(shares, trials):
    assert known_ledger(4.0, shares=shares).trials_of("other") == trials


@pytest.mark.slow
def test_the_first_trial_has_the_defaults(compared):
    results = compared[0]
    assert results["full"].trials[0].params == {
        "optim": "adamw_torch", "learning_rate": 3e-4, "full.norm_mode": "auto"
    }  # fmt: skip
    first = results["lp_ft+l2_sp"].trials[0].params
    assert first["l2_sp.alpha"] == 0.01 and first["learning_rate"] == 1e-4
    [note] = [note for note in results["lp_ft+l2_sp"].notes if "fits the head's features" in note]
    assert f" {first['lp_ft.head_lr']:g} (adamw_torch)" in note


@pytest.mark.slow
def test_the_second_trial_is_of_the_other_optimizer_at_the_same_share_of_its_range(compared):
    second = [contender.trials[1].params for contender in compared[0].contenders[:2]]
    assert [params["optim"] for params in second] == ["sgd", "sgd"]
    probe = compared[0]["linear_probe"].trials[0].params["learning_rate"]
    assert probe != 3e-4, "a probe's own rate is the one that fits its head"


@pytest.mark.slow
def test_what_a_training_run_records(compared):
    final = compared[0]["full"].runs[0]
    assert [point["epoch"] for point in final.curve] == [1.0, 2.0]
    assert final.best_epoch in (1.0, 2.0) and final.passes == 48
    assert final.seconds > 0 and final.compute > 0 and final.peak_memory_mb > 0 and final.checkpoint_mb > 0
    counted = sum(p.numel() for p in load()(0, False)[0].parameters())
    assert final.parameters_trained == counted
    assert compared[0]["linear_probe"].runs[0].parameters_trained == 16 * 3 + 3
    probe = compared[0]["linear_probe"].runs[0].distortion
    assert all(value["relative_l2"] == 0 for split in ("test", "ood") for value in probe[split].values())
    assert final.distortion["ood"]["features"]["relative_l2"] > 0
    assert final.versions["torch"] == torch.__version__


@pytest.mark.slow
def test_the_winner_is_a_plain_checkpoint_with_the_comparison_in_its_card(compared):
    results, folder, data, _ = compared
    means = {c.name: np.mean([r.validation for r in c.runs]) for c in results.contenders}
    assert means[results.winner] == max(means.values())
    model = AutoModelForImageClassification.from_pretrained(folder / "best")
    processor = AutoImageProcessor.from_pretrained(folder / "best")
    inputs = processor(images=[image.convert("RGB") for image in data["test"]["image"][:]], return_tensors="pt")
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(-1).tolist()
    saved = next(r for r in results[results.winner].runs if r.seed == results.winner_seed)
    assert predicted == list(saved.predictions["test"])
    card = (folder / "best" / "README.md").read_text()
    assert (
        "# best\n" in card and card.count("## Comparison") == 1 and "linear_probe" in card and "made by a test" in card
    )
    assert "Data: `data` (24 train, 12 validation, 18 test, 15 ood)." in card
    assert {"report.html", "report.md", "results.json", "best", "compare.db"} <= set(os.listdir(folder))
    assert not {"models", "work"} & set(os.listdir(folder / ".comparison"))


@pytest.mark.slow
def test_final_runs_keep_their_logits_and_are_calibrated_on_validation_alone(compared):
    results, folder, data, _ = compared
    for contender in results.contenders:
        assert not any(trial.logits or trial.calibration or trial.temperature for trial in contender.trials)
        for final in contender.runs:
            kept = load_file(folder / final.logits)
            for split in ("validation", "test", "ood"):
                logits, labels = kept[split].astype(np.float64), kept[f"{split}.labels"]
                assert labels.tolist() == data[split]["label"][:]
                assert tuple(logits.argmax(1).tolist()) == final.predictions[split]
                losses = [negative_log_likelihood(logits / t, labels) for t in (1.0, final.temperature)]
                assert final.calibration[split].log_loss == pytest.approx(losses)
                assert sum(one.samples for one in final.calibration[split].bins) == len(labels)
            valid = kept["validation"].astype(np.float64), kept["validation.labels"]
            best = minimize_scalar(lambda t, v=valid: negative_log_likelihood(v[0] / np.exp(t), v[1]), (-1, 1))
            assert final.calibration["validation"].log_loss[1] == pytest.approx(best.fun, abs=1e-4)


def negative_log_likelihood(logits, labels):
    return -np.mean(log_softmax(logits, axis=1)[np.arange(len(labels)), labels])


@pytest.mark.slow
def test_the_winner_has_the_temperature_of_its_run_and_predicts_with_it(compared):
    results, folder, data, _ = compared
    saved = next(r for r in results[results.winner].runs if r.seed == results.winner_seed)
    assert load_trained(folder / "best").calibration.temperature == saved.temperature != 1.0
    wanted = softmax(load_file(folder / saved.logits)["test"].astype(np.float64) / saved.temperature, axis=1)
    found = [one.outputs for one in predict(folder / "best", data["test"], device="cpu")]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    card = (folder / "best" / "README.md").read_text(encoding="utf-8")
    assert f"`ft_calibration.json`: log loss {saved.calibration['test'].log_loss[1]:.3f}" in card
    assert "Reliability: accuracy by confidence" in card
    assert "## Calibration" in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_mistakes_are_listed_and_have_thumbnails_on_request(compared, tmp_path):
    """Requested later, they need no training; without logits, as after version 0.1.0, there is no list."""
    results, folder, data, _ = compared
    saved = next(r for r in results[results.winner].runs if r.seed == results.winner_seed)
    labels, found = data["test"]["label"][:], results.mistakes
    wrong = [row for row, predicted in enumerate(saved.predictions["test"]) if predicted != labels[row]]
    assert found.number == len(wrong) > 0 and found.calibrated and not found.least_sure
    assert sorted(one.sample for one in found.surest) == sorted(f"row {row}" for row in wrong)
    sure = [one.probability for one in found.surest]
    assert sure == sorted(sure, reverse=True) and not any(one.shown for one in found.surest)
    assert "<img" not in (folder / "report.html").read_text()

    shutil.copytree(folder, tmp_path / "copy")
    again = run(tmp_path / "copy", "linear_probe,lp_ft+l2_sp", data=data, thumbnails=True)
    image = again.mistakes.surest[0].shown.removeprefix("data:image/jpeg;base64,")
    row = int(again.mistakes.surest[0].sample.removeprefix("row "))
    pixels = np.asarray(PIL.Image.open(BytesIO(base64.b64decode(image))), float)
    assert np.abs(pixels.mean((0, 1)) - np.asarray(data["test"][row]["image"]).mean((0, 1))).max() < 5
    assert (tmp_path / "copy" / "report.html").read_text().count("<img") == len(wrong)
    shutil.rmtree(tmp_path / "copy" / "logits")
    assert run(tmp_path / "copy", "linear_probe,lp_ft+l2_sp", data=data).mistakes is None


@pytest.mark.slow
def test_results_come_back_from_json(compared):
    results, folder = compared[:2]
    assert Results.load(folder / "results.json") == results
    assert results.data["class_counts"]["train"] == (8, 8, 8) and results.data["classes"] == tuple(NAMES)


@pytest.mark.slow
def test_a_second_call_trains_nothing_and_returns_the_same(compared, monkeypatch):
    results, folder, data, _ = compared
    monkeypatch.setattr("hf_ft.comparison.runner.Runner._evaluate", None)
    told = []
    again = run(folder, "linear_probe,lp_ft+l2_sp", data=data, told=told.append)
    assert lasting(again) == lasting(results)
    assert not [line for line in told if line.startswith("[")]


@pytest.mark.slow
def test_more_can_be_added_later(compared):
    results, folder, data, _ = compared
    more = run(folder, "linear_probe,lp_ft+l2_sp,layer_decay", data=data, seeds=1)
    assert lasting(more)["contenders"][0]["trials"] == lasting(results)["contenders"][0]["trials"]
    assert more["layer_decay"].status == "finished" and len(more["full"].runs) == 1
    run(folder, "linear_probe,lp_ft+l2_sp", data=data)  # and the others are kept


@pytest.mark.slow
def test_an_estimate_comes_first(compared):
    assert compared[3][0].startswith("estimate: 3 strategies x (2 trials + 2 final runs + 2 of the defaults)")


@pytest.mark.slow
def test_killed_and_started_again(tmp_path, whole):
    for trainings in (2, 3):  # the second call kills itself three training runs later
        done = python("-m", "tests.comparison.small_comparison", tmp_path / "killed", trainings)
        assert done.returncode == -9, done.stderr
    assert lasting(run(tmp_path / "killed", **SHORT)) == whole


@pytest.mark.slow
def test_the_time_is_up_and_then_there_is_more(tmp_path, monkeypatch):
    evaluate, made = Runner._evaluate, []

    def counted(runner, *what):
        made.append(what)
        if len(made) == 5:  # full fine-tuning's four, and one of the next
            runner._deadline = 0.0
        return evaluate(runner, *what)

    monkeypatch.setattr(Runner, "_evaluate", counted)
    part = run(tmp_path, "linear_probe,l2_sp", hours=1.0, num_train_epochs=1)
    assert [c.status for c in part.contenders] == ["finished", "unfinished", "not reached"]
    assert part.winner == "full"
    whole = run(tmp_path, "linear_probe,l2_sp", hours=1.0, num_train_epochs=1)
    assert [c.status for c in whole.contenders] == ["finished"] * 3
    assert lasting(whole)["contenders"][0] == lasting(part)["contenders"][0]


@pytest.fixture
def odd_strategies():
    """One that refuses, and one that fails in training if its rate is high."""

    def breaks(view):
        if breaks.rate is None or breaks.rate > 0.005:
            raise RuntimeError("broken <on purpose>")
        return view.weights(("",))[0].sum() * 0

    breaks.rate = None

    @register("refusing")
    @dataclass(frozen=True, kw_only=True)
    class RefusingConfig(FTConfig):
        """Refuses."""

        def check_model(self, model):
            raise OptionError("refusing.x=1: this model has no x.")

        def plan(self, model, state):
            return Plan()

    @register("breaking")
    @dataclass(frozen=True, kw_only=True)
    class BreakingConfig(FTConfig):
        """Breaks."""

        def check_arguments(self, args):
            breaks.rate = args.learning_rate

        def plan(self, model, state):
            return Plan(terms=(Term("breaks", breaks),))

    yield
    for name in ("refusing", "breaking"):
        del _CONFIGS[name]


@pytest.mark.slow
def test_failures_do_not_end_the_comparison_and_are_reported(tmp_path, odd_strategies):
    results = run(tmp_path, "refusing,breaking,soft", trials=4, **SHORT)
    refused, broken = results["refusing"], results["breaking"]
    assert refused.status == "cannot run" and refused.reason == "refusing.x=1: this model has no x."
    assert len(refused.trials) == 1 and not refused.runs
    errors = [trial.error for trial in broken.trials]
    assert "RuntimeError: broken <on purpose>" in errors and broken.status == "finished"
    assert broken.trials[broken.chosen].params["learning_rate"] <= 0.005
    assert results["soft"].status == "cannot run" and "head" in results["soft"].reason
    assert "source-free" in results["soft"].notes[0]
    assert "this model has no x" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_every_trial_failed(tmp_path, odd_strategies):
    results = run(tmp_path, "breaking", learning_rates="0.01,0.3", **SHORT)
    assert results["breaking"].status == "failed" and "broken" in results["breaking"].reason
    assert results.winner == "full"


@pytest.mark.slow
def test_what_is_measured_is_measured_once_and_counted(tmp_path, monkeypatch):
    looked = []

    @register("looking")
    @dataclass(frozen=True, kw_only=True)
    class LookingConfig(FTConfig):
        """Looks."""

        def measure(self, model, context):
            looked.append(context.samples.count)
            for batch in [*context.batches(), *context.batches()]:  # two thirds of the work of a training run
                model(**batch)
            return State({"x": torch.tensor([3.0])}, {"seen": 24})

        def plan(self, model, state):
            assert state.tensors["x"].item() == 3.0
            return Plan()

        def learned(self, state):
            return "looked at 24"

    try:
        results = run(tmp_path, "looking", trials=3, **SHORT)
    finally:
        del _CONFIGS["looking"]
    assert looked == [24]
    found = results["looking"]
    assert found.found == {"seen": 24} and found.learned == "looked at 24"
    assert found.measure_seconds > 0 and found.used == pytest.approx((2 + 2 / 3) / 3, rel=0.1)
    assert len(found.trials) == 2  # of three: the measurement took its share


@pytest.mark.slow
def test_without_tuning_all_run_with_their_own_defaults(tmp_path):
    """Measured once here too, in the first run, and not limited to a share of a budget."""
    search = BlockwiseConfig(search_epochs=2, validation=0.5, baselines=False)
    results = run(tmp_path, ["linear_probe", search], trials=0)
    for contender in results.contenders:
        assert contender.status == "finished" and not contender.trials and contender.chosen is None
        assert [run.seed for run in contender.runs] == [1, 2] and contender.tuning_seconds == contender.measure_seconds
    assert all(run.params["optim"] == "adamw_torch" for contender in results.contenders for run in contender.runs)
    assert {run.params["learning_rate"] for run in results["full"].runs} == {3e-4}
    blockwise = results["blockwise"]
    assert blockwise.configs[0]["search_epochs"] == 2 and blockwise.measure_seconds > 0
    assert blockwise.found["scores"] and blockwise.learned.startswith("Chosen by a search with scheme `stage`")
    report, card = ((tmp_path / name).read_text() for name in ("report.md", "best/README.md"))
    assert "## Tuning" not in report and "## Ranking" in report
    assert "Tuned" not in card and "## Comparison" in card
    assert run(tmp_path, ["linear_probe", search], trials=0) == results  # all done: nothing runs again


@pytest.mark.slow
def test_interrupted_after_its_measurement_it_reports_the_same(tmp_path, monkeypatch):
    search = BlockwiseConfig(search_epochs=1, validation=0.5, baselines=False)
    short = {"trials": 0, "seeds": 2, "num_train_epochs": 1}
    whole = run(tmp_path / "whole", [search], **short)
    keep = Kept.keep_states

    def interrupted(*given):
        keep(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Kept, "keep_states", interrupted)
        run(tmp_path / "two", [search], **short)
    again = run(tmp_path / "two", [search], **short)
    found, expected = again["blockwise"], whole["blockwise"]
    assert found.found["block"] == expected.found["block"] and found.learned == expected.learned != ""
    assert [run.validation for run in found.runs] == [run.validation for run in expected.runs]
    assert found.measure_seconds > 0


@pytest.mark.slow
def test_a_folder_with_another_comparison_is_refused(compared):
    with pytest.raises(OptionError, match="arguments.num_train_epochs"):
        run(compared[1], data=compared[2], num_train_epochs=3)
    with pytest.raises(OptionError, match="patience"):
        run(compared[1], data=compared[2], patience=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "classes"), [((20, 4), 2), ((12, 3, 1), 3)], ids=["two classes, unequal", "a class of one image"]
)
def test_unequal_classes(counts, classes, tmp_path):
    data = splits(train=counts, validation=(3,) * classes, test=(4,) * classes)
    results = run(tmp_path, "linear_probe", data=data, model=load(classes), class_weights="balanced", **SHORT)
    assert results.winner and results.data["class_counts"]["train"] == tuple(counts)


@pytest.mark.slow
def test_no_last_batch_has_a_single_sample(tmp_path):
    results = run(tmp_path, data=splits(train=(9, 8, 8)), seeds=1, trials=1)
    assert {c.status for c in results.contenders} == {"finished"}
    assert results.settings["per_device_train_batch_size"] == 7 and results["full"].runs[0].passes == 50
    assert batch_size(24, 8) == 8 and batch_size(1, 8) == 8 and batch_size(3, 2) == 2


@pytest.mark.slow
def test_other_metrics(tmp_path):
    results = run(tmp_path, metric="accuracy", trials=1, **SHORT)
    assert results.metric == "accuracy" and results["full"].runs[0].scores["test"]["accuracy"] >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategies": "full,lp"}, "unknown strategy 'lp'"),
        ({"strategies": "lp_ft,lp_ft"}, "lp_ft occurs twice"),
        ({"metric": "mse"}, "metric='mse' does not fit"),
        ({"metric": "auc"}, "metric='auc' is unknown"),
        ({"trials": -1}, "trials must be at least 0, got -1"),
        ({"hours": -1.0}, "hours must be positive, got -1.0"),
        ({"learning_rates": "0.1,0.01"}, "learning_rates must be two increasing positive numbers, .* got '0.1,0.01'"),
        ({"learning_rate": 0.1}, "learning_rate=0.1 cannot be set: the comparison itself sets"),
        ({"run_name": "mine"}, "run_name='mine' cannot be set: the comparison itself sets"),
        ({"num_epoch": 3}, "num_epoch=3: TrainingArguments has no such"),
        ({"lr_scheduler_type": "no_such"}, "no_such"),
    ],
)
def test_refused_before_anything_is_read(change, message, tmp_path):
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        run(tmp_path / "x", **change)
    assert not (tmp_path / "x").exists()


def test_a_missing_test_split_is_named(tmp_path):
    data = splits()
    del data["test"]
    with pytest.raises(OptionError, match="no split 'test'"):
        run(tmp_path, data=data)


def test_names_for_variants():
    chosen = chosen_strategies({"weak": L2SPConfig(alpha=1e-3), "both": "lp_ft+bss"})
    assert list(chosen) == ["full", "weak", "both"]
    assert [config.ft_type for config in chosen["both"]] == ["lp_ft", "bss"]


def test_each_optimizer_has_its_own_rates_and_arguments():
    assert optimizers(training_arguments({}), "image") == ("adamw_torch", "sgd")
    assert optimizers(training_arguments({}), "text") == ("adamw_torch",)
    chosen = training_arguments({"optim": OptimizerNames.SGD, "max_grad_norm": 0.5})
    assert optimizers(chosen, "text") == ("sgd",)
    sgd, adam = under(chosen, "sgd"), under(training_arguments({}), "adamw_torch")
    assert (sgd["optim_args"], sgd["max_grad_norm"]) == ("momentum=0.9", 0.5)
    assert under(training_arguments({}), "sgd")["max_grad_norm"] == 0.0
    assert "optim_args" not in adam and "max_grad_norm" not in adam
    with pytest.raises(OptionError, match="optim_args='nesterov=True' belongs to an optimizer"):
        training_arguments({"optim_args": "nesterov=True"})


def test_a_strategy_is_warmed_up_as_it_recommends_unless_the_user_decides():
    soft = recommended_arguments([SoftConfig()])
    assert under(training_arguments({}), "adamw_torch", soft)["warmup_steps"] == 0.1
    assert under(training_arguments({"warmup_steps": 5}), "adamw_torch", soft)["warmup_steps"] == 5
    assert "warmup_steps" not in under(training_arguments({}), "adamw_torch", recommended_arguments([FullConfig()]))


def test_rates_lie_around_the_recommended_one_unless_the_user_says_where():
    rates = Settings().rates(3e-4)
    assert rates.high / rates.low == pytest.approx(30, rel=0.05) and rates.at(0.5) == pytest.approx(3e-4, rel=0.05)
    assert Settings(learning_rates="1e-5,1e-1").rates(3e-4) == LogRange(1e-5, 1e-1)


def test_time_between_epochs_is_not_counted():
    clock = Clock()
    sum(range(200_000))
    clock.on_epoch_end(None, None, None)
    at = clock.seconds
    sum(range(2_000_000))
    clock.on_epoch_begin(None, None, None)
    clock.on_train_end(None, None, None)
    assert at > 0 and clock.seconds < at + clock.paused
    assert clock.paused > 0


def test_peak_memory_includes_what_was_freed():
    with PeakMemory() as memory:
        held = torch.ones(64 * 2**20 // 4)
        time.sleep(0.3)
        del held
    assert 60 < memory.mb < 200


def test_only_the_best_model_of_a_contender_is_kept(tmp_path):
    kept = Kept(tmp_path)
    kept.claim()
    cut_off = kept.model("a", 5).parent / "score.json"  # by a worker that was killed
    cut_off.parent.mkdir(parents=True)
    cut_off.write_text("")
    for seed, score in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6)):
        kept.model("a", seed).mkdir(parents=True)
        kept.keep_best("a", seed, score)
    assert [path.name for path in (kept.own / "models" / "a").iterdir()] == ["seed-2"]
    assert kept.has_model("a", 2) and not kept.has_model("a", 3)
    best = kept.crown("a", 2)
    assert best == tmp_path / "best" and kept.model("a", 2).is_dir()  # others may still be selected
    kept.clear()
    assert kept.has_model("a", 2) and not (kept.own / "models").exists()
    assert json.loads((best / "comparison.json").read_text()) == {"contender": "a", "seed": 2}


@pytest.mark.parametrize("name", ["models", "work", "best", "results.json", ".git"])
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path, name):
    file = tmp_path / name / "mine" if "." not in name else tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    with pytest.raises(OptionError, match=f"output_dir=.* holds files that no comparison wrote \\({name}\\)"):
        run(tmp_path, "linear_probe")
    assert [path.name for path in tmp_path.iterdir()] == [name] and file.read_text() == "precious"


@pytest.mark.slow
def test_what_others_put_into_its_folder_is_left_as_it_is(tmp_path):
    run(tmp_path, "linear_probe", trials=0, **SHORT)
    for name in ("models", "work", "states"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    run(tmp_path, "linear_probe", trials=0, **{**SHORT, "seeds": 2})
    assert all((tmp_path / name / "mine").read_text() == "precious" for name in ("models", "work", "states"))
    shutil.rmtree(tmp_path / "best")
    (tmp_path / "best").mkdir()
    with pytest.raises(OptionError, match="best was not written by a comparison"):
        run(tmp_path, "linear_probe", trials=0, **{**SHORT, "seeds": 2})


@pytest.mark.slow
def test_the_winner_saved_is_the_one_that_the_results_name(tmp_path):
    """Fewer trials select another setting; the model of the larger comparison is not mistaken for it."""
    for trials in (1, 4, 1):
        results = run(tmp_path, trials=trials, seeds=1)
        saved = results[results.winner].runs[0]
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "best")
        images = [image.convert("RGB") for image in splits()["test"]["image"][:]]
        pixels = AutoImageProcessor.from_pretrained(tmp_path / "best")(images=images, return_tensors="pt")
        with torch.no_grad():
            assert model(**pixels).logits.argmax(-1).tolist() == list(saved.predictions["test"])


@pytest.mark.slow
def test_a_finished_comparison_trains_nothing_again(tmp_path):
    """Not a single step; results, report and winner are the same."""
    first = run(tmp_path, "linear_probe,daft", trials=2, **SHORT)
    files = ("results.json", "report.md", "report.html", "best/model.safetensors")
    before = {name: (tmp_path / name).read_bytes() for name in files}
    steps = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        again = run(tmp_path, "linear_probe,daft", trials=2, **SHORT)
    finally:
        handle.remove()
    assert not steps and lasting(again) == lasting(first)
    assert {name: (tmp_path / name).read_bytes() for name in files} == before


@pytest.mark.slow
def test_the_baseline_fails_at_first(tmp_path, monkeypatch):
    """The cost of a training run is then unknown, and all have the same number of trials."""
    once = []

    def failing(entrant, values, *more, **keywords):
        if entrant.name == "full" and not once and len(more) > 3:  # not to warm up
            once.append(values)
            raise RuntimeError("the disk is gone")
        return train(entrant, values, *more, **keywords)

    monkeypatch.setattr("hf_ft.comparison.runner.train", failing)
    results = run(tmp_path, trials=3, **SHORT)
    assert once and results["full"].trials[0].error and results["full"].status == "finished"
    assert [len(contender.trials) for contender in results.contenders] == [3, 3]


@pytest.mark.slow
def test_what_failed_is_tried_again_on_request(tmp_path, monkeypatch):
    """Only what failed; the results are those of a comparison in which nothing failed."""

    def failing(entrant, values, *more, **keywords):
        if entrant.name == "l2_sp":
            raise RuntimeError("out of memory of the GPU")
        return train(entrant, values, *more, **keywords)

    monkeypatch.setattr("hf_ft.comparison.runner.train", failing)
    failed = run(tmp_path / "again", "l2_sp", trials=2, **SHORT)
    assert failed["l2_sp"].status == "failed"
    monkeypatch.undo()
    assert lasting(run(tmp_path / "again", "l2_sp", trials=2, **SHORT)) == lasting(failed)
    calls = []
    monkeypatch.setattr(
        "hf_ft.comparison.runner.train",
        lambda entrant, *more, **k: (calls.append(entrant.name), train(entrant, *more, **k))[1],
    )
    whole = lasting(run(tmp_path / "whole", "l2_sp", trials=2, **SHORT))
    calls.clear()
    assert lasting(run(tmp_path / "again", "l2_sp", trials=2, retry_failed=True, **SHORT)) == whole
    assert calls.count("l2_sp") == 3 and set(calls) <= {"l2_sp", "full"}  # two trials, one run; full to warm up
    calls.clear()
    assert lasting(run(tmp_path / "again", "l2_sp", trials=2, retry_failed=True, **SHORT)) == whole and not calls


@pytest.mark.slow
def test_a_full_disk_decides_nothing(tmp_path, monkeypatch, whole):
    """It stops the comparison; the same call continues it, with the results of an uninterrupted one."""
    calls = []

    def full(entrant, values, *more, **keywords):
        calls.append(entrant.name)
        if len(calls) == 4:
            raise RuntimeError("cannot save") from OSError(errno.ENOSPC, "No space left on device")
        return train(entrant, values, *more, **keywords)

    monkeypatch.setattr("hf_ft.comparison.runner.train", full)
    with pytest.raises(MachineError, match=r"\w+, trial \d: OSError: .*No space left on device.*run it again"):
        run(tmp_path / "full", trials=2, **SHORT)
    monkeypatch.undo()
    assert lasting(run(tmp_path / "full", trials=2, **SHORT)) == whole


@pytest.mark.slow
def test_a_diverged_trial_ends_early_and_leaves_its_work_to_further_trials(tmp_path):
    rates = {"learning_rates": "1e4,1e6", "optim": "sgd"}
    results = run(tmp_path, trials=3, seeds=1, num_train_epochs=6, **rates)
    trials = results["full"].trials
    assert all(trial.share < 1 for trial in trials) and len(trials) == 3  # most_trials=1 is the limit here
    assert results["full"].used < 0.9
    assert all(trial.passes < 6 * len(splits()["train"]) for trial in trials)


@pytest.mark.slow
def test_a_search_counts_though_its_training_fails(tmp_path):
    looked = []

    @register("looking")
    @dataclass(frozen=True, kw_only=True)
    class LookingConfig(FTConfig):
        """Measures, and fails at its first rate."""

        def measure(self, model, context):
            looked.append(1)
            return State({"x": torch.ones(1)}, {"seen": 1})

        def plan(self, model, state):
            return Plan(terms=(Term("breaks", _breaks_once),))

    try:
        results = run(tmp_path, "looking", trials=2, **SHORT)
    finally:
        del _CONFIGS["looking"]
        _breaks_once.times = 0
    found = results["looking"]
    assert found.trials[0].error and found.status == "finished"
    assert looked == [1] and found.found == {"seen": 1} and found.measure_seconds > 0


def _breaks_once(view):
    _breaks_once.times += 1
    if _breaks_once.times == 1:
        raise RuntimeError("broken")
    return view.weights(("",))[0].sum() * 0


_breaks_once.times = 0


@pytest.mark.slow
def test_augmented_images_can_be_resumed_and_are_measured_unaugmented(tmp_path):
    data = splits()
    given = Data(data, find_columns(data), augment="basic")
    first = run(tmp_path, "daft", data=given, trials=1, seeds=1)
    told = []
    again = run(tmp_path, "daft", data=given, trials=1, seeds=1, told=told.append)
    assert lasting(again) == lasting(first) and not [line for line in told if line.startswith("[")]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["a row of train", "source data", "augmentation"])
def test_other_data_are_another_comparison(change, compared):
    folder, data = compared[1:3]
    columns = find_columns(data)
    if change == "a row of train":
        rows = data["train"].to_dict()
        rows["label"][3] = (rows["label"][3] + 1) % 3
        other = DatasetDict({**data, "train": Dataset.from_dict(rows, features=data["train"].features)})
        given = Data(other, columns)
    elif change == "source data":
        given = Data(data, columns, source=data["test"], source_columns=columns)
    else:
        given = Data(data, columns, augment="basic")
    with pytest.raises(OptionError, match="created with other settings: .*another output folder"):
        run(folder, data=given)


@pytest.mark.slow
def test_augmentation_and_mixing_are_reported_and_make_another_comparison(tmp_path):
    data = splits()
    given = Data(data, find_columns(data), augment="trivial")
    results = run(tmp_path, "linear_probe", data=given, trials=0, mixup=0.2, **SHORT)
    assert results.settings["mixup"] == 0.2 and not any(c.reason for c in results.contenders)
    report = (tmp_path / "report.md").read_text()
    assert "training images are augmented: trivial" in report and "mixup" in report
    card = (tmp_path / "best" / "README.md").read_text()
    assert "| mixup | `0.2` |" in card and "Training images were augmented: trivial." in card
    with pytest.raises(OptionError, match="created with other settings"):
        run(tmp_path, "linear_probe", data=given, trials=0, cutmix=1.0, **SHORT)


def test_epochs_whose_outputs_are_not_finite_have_no_score():
    labels = np.array([0, 1, 2])
    assert finite_metrics(EvalPrediction(np.eye(3), labels))["accuracy"] == 1.0
    bad = np.eye(3)
    bad[1, 1] = np.nan
    assert np.isnan(finite_metrics(EvalPrediction(bad, labels))["accuracy"])
    assert np.isnan(finite_metrics(EvalPrediction(np.array([[1.0], [np.inf]]), np.zeros(2)))["mse"])


def test_a_process_that_dies_in_a_training_is_given_up():
    jobs = [Job("a", {}), Job("b", {})]
    storage = open_storage(None)
    for _ in range(2):  # two workers that died in it
        claims = Claims(storage, open_study(storage, "s", None), as_json({"pruner": None}, ""), 10.0, [{}])
        claims.read()
        trial = claims.claim("a", {})
        claims.finish(trial, "FAIL", failure="worker died")
    done = run_trials(jobs, lambda job, report: 1.0, storage=storage, name="s", signature={}, deaths=2)
    assert list(done) == ["b"]
    assert list(run_trials(jobs, lambda job, report: 1.0, storage=storage, name="s", signature={})) == ["a", "b"]


@pytest.mark.slow
def test_names_may_contain_anything(tmp_path):
    results = run(tmp_path, {"../a/b: 1 %": "linear_probe"}, trials=1, **SHORT)
    assert results["../a/b: 1 %"].status == "finished"
    assert not (tmp_path.parent / "a").exists()


def test_chosen_at_the_end_of_what_was_tried():
    bench = Bench(lambda seed, keep: None, {}, list)
    made = Entrant("l2_sp", (L2SPConfig(),), {"sgd": {"learning_rate": LogRange(1e-5, 0.3)}}, {}, bench)
    tried = [{"learning_rate": rate} for rate in (0.01, 1e-4, 0.05)]
    assert made.edges(tried[2], tried) == ("learning_rate",) and made.edges(tried[0], tried) == ()


@pytest.mark.slow
def test_what_a_user_sets_is_not_tuned(tmp_path):
    results = run(tmp_path, [L2SPConfig(alpha=0.3)], trials=2, **SHORT)
    assert results["l2_sp"].trials[1].params.keys() == {"optim", "learning_rate", "l2_sp.norm_mode"}
    assert results["l2_sp"].configs[0]["alpha"] == 0.3
    own = run(tmp_path, [[LPFTConfig(batch_norm_momentum=0.3), L2SPConfig()]], trials=1, **SHORT)
    assert own["lp_ft+l2_sp"].status == "finished"


def test_what_is_chosen_after_training_counts(tmp_path):
    """The score of a training run is that of the averaged model, in trials as in final runs."""
    results = run(tmp_path / "out", {"line": [WiSEFTConfig(steps=2)]}, trials=1, seeds=1)
    own = results["line"]
    for training in (*own.trials, *own.runs):
        assert training.chosen["wise_ft"] in (0.0, 0.5, 1.0)
        at_one = max(point["validation"] for point in training.curve)
        assert training.validation >= at_one and len(training.curve) == 2
    assert own.runs[0].scores["validation"][results.metric] == own.runs[0].validation
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"after training, by seed: wise_ft {own.runs[0].chosen['wise_ft']:g}" in text.replace("\\", "")
    assert not results["full"].runs[0].chosen


def test_some_contenders_alone_have_the_same_budget_and_scores(tmp_path):
    told = {"settings": Settings(trials=2, seeds=1, most_trials=1, distortion_samples=0, folds=1)}
    told |= {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True, "tell": lambda line: None}
    both = prepare_comparison(load(), splits(), "linear_probe,l2_sp", output_dir=tmp_path / "all", **told)
    both.runner.run()
    alone = prepare_comparison(load(), splits(), "linear_probe,l2_sp", output_dir=tmp_path / "one", **told)
    alone.runner.run(only={"l2_sp"})
    baseline, probe, l2_sp = alone.runner.ledger.entrants
    ledger, whole = alone.runner.ledger, both.runner.ledger
    assert ledger.trial(baseline, 0) and not ledger.trial(baseline, 1) and not ledger.trial(probe, 0)
    assert ledger.allowed == whole.allowed > 0 and ledger.trials_of(l2_sp) == whole.trials_of(l2_sp)
    assert [run.validation for run in ledger.runs(l2_sp)] == [run.validation for run in whole.runs(l2_sp)] != []
