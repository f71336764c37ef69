"""The average of a comparison's final runs: its members, its scores, its folder, and continuing."""

import os
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_ft import OptionError
from hf_ft.comparison import Results
from hf_ft.comparison.folder import Kept
from hf_ft.comparison.outputs import scored
from hf_ft.comparison.report.build import document
from hf_ft.documents.markdown import markdown
from hf_ft.inference import load_trained
from hf_ft.testing import same_tensors
from hf_ft.testing.training import snapshot
from tests.comparison.small_comparison import any_temperature, lasting, load, run, splits


def models(folder):
    """Weights of the stored models of final runs, by contender's folder and seed."""
    found = sorted((folder / ".comparison" / "models").glob("*/seed-*/best"))
    return {path.parent: AutoModelForImageClassification.from_pretrained(path).state_dict() for path in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soup") / "out"
    with any_temperature():
        return folder, run(folder, "linear_probe", trials=0, seeds=2, soup="uniform")


def test_uniform_is_the_mean_of_all_final_runs(made):
    folder, results = made
    assert [(one.contender, one.seed, one.member) for one in results.soup.ingredients] == [
        ("full", 1, True), ("full", 2, True), ("linear_probe", 1, True), ("linear_probe", 2, True)
    ]  # fmt: skip
    states = list(models(folder).values())
    assert len(states) == 4
    soup = AutoModelForImageClassification.from_pretrained(folder / "soup")
    for name, value in soup.named_parameters():
        wanted = torch.stack([state[name].double() for state in states]).mean(0).float()
        torch.testing.assert_close(value.data, wanted, rtol=0, atol=0)
    assert set(results.soup.scores) == {"validation", "test"}
    assert results.soup.validation == results.soup.scores["validation"][results.metric]


def test_its_scores_are_those_of_the_saved_model(made):
    folder, results = made
    model = AutoModelForImageClassification.from_pretrained(folder / "soup").eval()
    processor = load()(0, False)[1]
    data = splits()["test"]
    with torch.no_grad():
        logits = model(**processor(list(data["image"]), return_tensors="pt")).logits
    hits = logits.argmax(-1).numpy() == np.array(data["label"])
    recalls = [hits[np.array(data["label"]) == c].mean() for c in range(3)]
    assert results.soup.scores["test"]["balanced_accuracy"] == pytest.approx(float(np.mean(recalls)))


def test_it_is_in_the_report_the_card_and_the_results(made):
    folder, results = made
    assert Results.load(folder / "results.json").soup == results.soup
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "## The average of the final runs" in text
    assert (
        "The weights of 4 of 4 final runs (all that are alike) averaged into one model, which costs one forward pass"
        in text
    )
    assert load_trained(folder / "soup").calibration.rows == 12
    card = (folder / "soup" / "README.md").read_text(encoding="utf-8")
    assert "The mean of the weights of 4 fine-tuned models: full (seed 1)" in card and "## Comparison" in card
    without = Results.from_dict({**results.to_dict(), "soup": None})
    assert "average of the final runs" not in markdown(document(without))


def test_the_same_call_again_makes_nothing_anew(made, monkeypatch):
    folder, results = made
    written = (folder / "soup" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("hf_ft.comparison.soup.mix", None)
    again = run(folder, "linear_probe", trials=0, seeds=2, soup="uniform")
    assert lasting(again) == lasting(results) and again.soup == results.soup
    assert (folder / "soup" / "model.safetensors").stat().st_mtime_ns == written


def test_runs_whose_models_were_not_kept_are_trained_again(made, tmp_path):
    """As after a comparison without a soup: the same soup, bit for bit."""
    folder, results = made
    plain = tmp_path / "plain"
    run(plain, "linear_probe", trials=0, seeds=2)
    assert not (plain / ".comparison" / "models").exists() and not (plain / "soup").exists()
    again = run(plain, "linear_probe", trials=0, seeds=2, soup="uniform")
    assert again.soup == results.soup
    one, other = (AutoModelForImageClassification.from_pretrained(path / "soup") for path in (folder, plain))
    same_tensors(snapshot(one), snapshot(other))


def test_greedy_does_at_least_as_well_on_validation_as_the_best_run(tmp_path):
    results = run(tmp_path / "out", "linear_probe", trials=0, seeds=2, soup="greedy")
    runs = [training for contender in results.contenders for training in contender.runs]
    assert results.soup.validation >= max(training.validation for training in runs)
    first = max(results.soup.ingredients, key=lambda one: one.validation)
    assert first.member and first.with_it is None
    assert sum(one.with_it is None for one in results.soup.ingredients) == 1


def test_trials_go_in_too(tmp_path, monkeypatch):
    """All of them, each from its own stored model, which is not scored on the test split."""
    tested = count_tests(monkeypatch)
    results = run(tmp_path / "out", [], trials=2, seeds=1, soup="uniform", soup_of="trials")
    assert [(one.number, one.member) for one in results.soup.ingredients] == [
        ("seed 1", True), ("trial 1", True), ("trial 2", True)
    ]  # fmt: skip
    assert tested == {"run": 1, "soup": 1}
    states = models(tmp_path / "out")
    assert sorted(path.name for path in states) == ["seed-0", "seed-0", "seed-1"]
    soup = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "soup")
    for name, value in soup.named_parameters():
        wanted = torch.stack([state[name].double() for state in states.values()]).mean(0).float()
        torch.testing.assert_close(value.data, wanted, rtol=0, atol=1e-7)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert (
        "## The average of the trials and final runs" in text
        and "trial 2" in text.rpartition("and which of them are averaged")[2]
    )
    # A comparison that kept no trials makes the same soup: it trains them again, and still does not test them.
    tested.clear()
    run(tmp_path / "plain", [], trials=2, seeds=1)
    again = run(tmp_path / "plain", [], trials=2, seeds=1, soup="uniform", soup_of="trials")
    assert again.soup == results.soup and tested == {"run": 1, "soup": 1}


def count_tests(monkeypatch):
    """How often models are scored on the test split, by caller."""
    counts = Counter()

    def counted(module, who):
        original = scored

        def score(*args):
            counts[who] += 1
            return original(*args)

        monkeypatch.setattr(f"hf_ft.comparison.{module}.scored", score)

    counted("training", "run")
    counted("soup", "soup")
    return counts


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process to kill")
def test_a_kill_while_it_is_made_loses_nothing(made, tmp_path):
    """By kill -9 just before the finished soup is moved into place."""
    folder, results = tmp_path / "out", made[1]
    shutil.copytree(made[0], folder)
    shutil.rmtree(folder / "soup")
    child = os.fork()
    if not child:
        Kept.place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        run(folder, "linear_probe", trials=0, seeds=2, soup="uniform")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (folder / "soup").exists()
    again = run(folder, "linear_probe", trials=0, seeds=2, soup="uniform")
    assert again.soup == results.soup and (folder / "soup" / "model.safetensors").is_file()
    assert not list((folder / ".comparison").glob("work/*"))


def test_nothing_of_others_is_overwritten(tmp_path):
    folder = tmp_path / "out"
    run(folder, [], trials=0, seeds=1)
    (folder / "soup").mkdir()
    (folder / "soup" / "recipe.txt").write_text("leek")
    with pytest.raises(OptionError, match="soup was not written by a comparison"):
        run(folder, [], trials=0, seeds=1, soup="uniform")
    assert (folder / "soup" / "recipe.txt").read_text() == "leek"
    run(folder, [], trials=0, seeds=1)  # without a soup, it is not in the way


def test_folds_are_refused(tmp_path):
    with pytest.raises(OptionError, match=r"soup='greedy' needs one validation split .*set folds=1"):
        run(tmp_path / "out", trials=0, soup="greedy", folds=2)
    for wrong, match in (
        ({"trials": 0, "soup": "best"}, "soup='best' is unknown"),
        ({"soup": "uniform", "soup_of": "all"}, "soup_of='all' is unknown"),
        ({"soup_of": "trials"}, "but soup='none': set soup='greedy'"),
        ({"trials": 0, "soup": "uniform", "soup_of": "trials"}, "but trials=0"),
    ):
        with pytest.raises(OptionError, match=match):
            run(tmp_path / "out", **wrong)
