"""The average of a comparison's final runs: what goes in, its scores, its folder, and continuing."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_ft import OptionError
from hf_ft.comparison import Results
from hf_ft.comparison.report.build import document
from hf_ft.documents.markdown import markdown
from hf_ft.inference import load_trained
from hf_ft.testing import same_tensors
from hf_ft.testing.training import snapshot
from tests.comparison.small_comparison import any_temperature, lasting, load, run, splits


def models(folder):
    """Weights of the kept models of final runs, by folder of the contender and seed."""
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


def test_the_report_the_card_and_the_results_hold_it(made):
    folder, results = made
    assert Results.load(folder / "results.json").soup == results.soup
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "## The average of the final runs" in text
    assert (
        "The weights of 4 of 4 final runs (all that are alike) averaged to one model, which costs one forward pass"
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


def test_nothing_of_others_is_overwritten(tmp_path):
    folder = tmp_path / "out"
    run(folder, [], trials=0, seeds=1)
    (folder / "soup").mkdir()
    (folder / "soup" / "recipe.txt").write_text("leek")
    with pytest.raises(OptionError, match="soup was not written by a comparison"):
        run(folder, [], trials=0, seeds=1, soup="uniform")
    assert (folder / "soup" / "recipe.txt").read_text() == "leek"
    run(folder, [], trials=0, seeds=1)  # without a soup it is in nobody's way


def test_folds_are_refused(tmp_path):
    with pytest.raises(OptionError, match=r"soup='greedy' needs one validation split .*set folds=1"):
        run(tmp_path / "out", trials=0, soup="greedy", folds=2)
    with pytest.raises(OptionError, match="soup='best' is unknown"):
        run(tmp_path / "out", trials=0, soup="best")
