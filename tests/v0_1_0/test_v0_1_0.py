"""Files written by version 0.1.0 load and mean the same; tests/v0_1_0/make.py wrote them."""

import copy
import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import is_torchvision_available

import hf_ft
from hf_ft.cli import main
from hf_ft.comparison import Results
from hf_ft.comparison.statistics import standings
from hf_ft.core.config import as_saved
from hf_ft.testing import same_tensors
from tests.v0_1_0 import make

DATA = make.HERE
DOCS = Path(hf_ft.__file__).parents[1] / "docs" / "results"
NEAR = 1e-5  # the change allowed by rounding on another processor
pil = pytest.mark.skipif(
    getattr(hf.AutoImageProcessor, "is_dummy", False),
    reason="this version of Transformers has no image processors without torchvision",
)
STRATEGIES = (
    "amcf attention_transfer bss blockwise co_tuning daft delta full gradual_unfreezing l2_sp lp_ft layer_decay "
    "linear_probe lwf soft tred"
)


@pytest.fixture(scope="module")
def expected():
    return load_file(DATA / "expected.safetensors")


@pytest.fixture
def steps():
    """The optimizer steps taken in any training run."""
    taken = []
    handle = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    yield taken
    handle.remove()


def fixed_inputs():
    return {"pixel_values": torch.from_numpy(make.pixels(4, 9))}


def assert_near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=NEAR)


def assert_kept(found, saved, path=""):
    """Assert that everything saved is present and the same; later versions may add more."""
    if isinstance(saved, dict):
        for name, value in saved.items():
            assert name in found, f"{path}.{name} is gone"
            assert_kept(found[name], value, f"{path}.{name}")
    elif isinstance(saved, list):
        assert len(found) == len(saved), path
        for place, (one, other) in enumerate(zip(found, saved, strict=True)):
            assert_kept(one, other, f"{path}[{place}]")
    else:
        assert found == saved, path


# --- configs and checkpoints --------------------------------------------------------------------------------


@pytest.mark.newest
def test_every_config():
    loaded = hf_ft.load_configs(DATA / "configs")
    assert [config.ft_type for config in loaded] == STRATEGIES.split()
    assert loaded == tuple(as_saved(make.as_before(config)) for config in make.CONFIGS)  # without what is local
    saved = json.loads((DATA / "configs" / "ft_config.json").read_text())["strategies"]
    for config, content in zip(loaded, saved, strict=True):
        default = type(config)().to_dict()
        same = [name for name in content if name != "ft_type" and content[name] == default[name]]
        assert not same, f"{config.ft_type} shows nothing of {same}"


@pytest.mark.newest
def test_an_option_is_written_in_the_same_form():
    """Resuming a run and naming a study compare these dictionaries."""
    saved = json.loads((DATA / "configs" / "ft_config.json").read_text())["strategies"]
    for config, content in zip(make.CONFIGS, saved, strict=True):
        assert_kept(json.loads(json.dumps(config.to_dict())), content, config.ft_type)


def test_a_trained_checkpoint(expected):
    model = hf.AutoModelForImageClassification.from_pretrained(DATA / "trained")
    assert_near(make.logits(model, fixed_inputs()), expected["trained.logits"])
    assert hf_ft.load_configs(DATA / "trained") == make.TRAINED
    with torch.no_grad():
        model.classifier[-1].weight.zero_()
    hf_ft.load_weights(model, DATA / "trained")
    assert_near(make.logits(model, fixed_inputs()), expected["trained.logits"])


@pytest.mark.parametrize("name", make.INTERRUPTED)
@pytest.mark.newest
def test_an_interrupted_run_continues(name, tmp_path, expected, steps):
    """With its optimizer, schedule, data order and streams, to the same result as the whole run."""
    shutil.copytree(DATA / name, tmp_path / name)
    trainer = make.interrupted(name, tmp_path / name, DATA / "resnet")
    trainer.train(resume_from_checkpoint=True)
    assert len(steps) == 8 - make.INTERRUPTED[name][1]
    wanted = {key.removeprefix(f"{name}."): value for key, value in expected.items() if key.startswith(f"{name}.")}
    found = make.snapshot(trainer.model)
    assert set(found) == set(wanted)
    for name in [name for name in wanted if ".original_module." in name]:  # PEFT keeps the new head, which is not used
        del found[name], wanted[name]
    same_tensors(found, wanted, NEAR)


@pytest.mark.parametrize("base", ["a folder", "a model"])
def test_a_delta(base, expected):
    given = str(DATA / "resnet") if base == "a folder" else make.base(DATA / "resnet")
    model = hf_ft.load_delta(given, DATA / "delta")
    assert_near(make.logits(model, fixed_inputs()), expected["delta.logits"])
    assert hf_ft.load_configs(DATA / "delta") == (make.CHANGED,)


@pytest.mark.skipif(is_torchvision_available(), reason="the images were resized without torchvision")
def test_an_ensemble_with_its_processor(expected):
    model = hf.AutoModelForImageClassification.from_pretrained(DATA / "ensemble")
    processor = hf.AutoImageProcessor.from_pretrained(DATA / "ensemble")
    assert isinstance(model, hf_ft.CollaborativeModel) and len(model.members) == 2
    assert isinstance(processor, hf_ft.CollaborativeImageProcessor)
    inputs = processor(make.photos(), return_tensors="pt")
    assert list(inputs) == list(model.input_names) == ["pixel_values", "pixel_values_1"]
    assert_near(make.logits(model, inputs), expected["ensemble.logits"])


# --- studies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make.SEARCHES)
def test_a_finished_search_trains_nothing_again(name, tmp_path, steps):
    file = make.STUDIES[name]
    make.unpack(DATA / name / f"{file}.gz", tmp_path / file)
    state = make.searching(name, tmp_path, DATA).measure()[name]
    assert not steps
    saved = json.loads((DATA / "searches.json").read_text())[name]
    assert_kept(json.loads(json.dumps(state.info)), saved)
    kind, content = (hf_ft.SwarmScores, "swarm") if name == "amcf" else (hf_ft.BlockScores, "scores")
    assert make.SEARCHES[name].scores(state) == kind.from_dict(saved[content])


# --- comparisons --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as left by `hf-ft compare`, with model and data next to it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    for name in ("compare", "resnet"):
        shutil.copytree(DATA / name, tmp_path / name)
    make.unpack(DATA / "compare" / "compare.db.gz", tmp_path / "compare" / "compare.db")
    make.write_images("images")
    yield tmp_path
    logging.getLogger("hf_ft").handlers.clear()


def test_results_are_read(folder):
    saved = json.loads((DATA / "compare" / "results.json").read_text())
    results = Results.load(DATA / "compare" / "results.json")
    assert_kept(json.loads(json.dumps(results.to_dict())), saved)
    assert [contender.name for contender in results.contenders] == ["full", "linear_probe", "daft"]
    assert {contender.status for contender in results.contenders} == {"finished"}
    assert {standing.contender.name for standing in standings(results)} == {"full", "linear_probe", "daft"}
    for contender in results.contenders:
        assert [hf_ft.FTConfig.from_dict(content).ft_type for content in contender.configs] == [contender.name]


@pil
def test_a_comparison_with_other_rates_is_refused_and_left_as_it_is(folder, steps, capsys):
    """It was tuned in other ranges and only with SGD: its training runs differ from today's."""
    before = {file: file.read_bytes() for file in Path("compare").rglob("*") if file.is_file() and file.suffix != ".db"}
    assert main(copy.copy(make.COMPARE)) == 2
    said = capsys.readouterr().err
    assert "the study 'compare' was created with other settings: " in said and "arguments.optim ('sgd' there" in said
    assert not steps and {file: file.read_bytes() for file in before} == before


def test_a_report_is_made_again(folder, capsys):
    saved = json.loads((DATA / "compare" / "results.json").read_text())
    assert main(["compare", "--report", "compare"]) == 0
    assert saved["winner"] in capsys.readouterr().out
    assert_kept(json.loads(Path("compare/results.json").read_text()), saved)
    report = Path("compare/report.md").read_text()
    for standing in standings(Results.load("compare/results.json")):
        assert f"| {standing.name} |" in report.replace("**", "")
    assert " s of " in report, "the budget was one of seconds"


@pil
def test_the_winner_predicts_what_the_results_contain(folder):
    results = Results.load("compare/results.json")
    [run] = [run for run in results[results.winner].runs if run.seed == results.winner_seed]
    model = hf.AutoModelForImageClassification.from_pretrained("compare/best")
    photos = datasets.load_from_disk("images")["test"]["image"][:]
    inputs = hf.AutoImageProcessor.from_pretrained("compare/best")(photos, return_tensors="pt")
    assert make.logits(model, inputs).argmax(-1).tolist() == list(run.predictions["test"])


@pytest.mark.parametrize("file", sorted(DOCS.glob("*/*.json")), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_stored_results_are_read(file):
    results, saved = Results.load(file), json.loads(file.read_text())
    assert results.contenders[0].name == "full" and results[results.winner].finished_runs
    for contender, content in zip(results.contenders, saved["contenders"], strict=True):
        assert content.keys() <= vars(contender).keys() and contender.found == content["found"]
        for kind in ("trials", "runs"):
            for training, values in zip(getattr(contender, kind), content[kind], strict=True):
                assert values.keys() <= vars(training).keys()
                for name in ("seed", "params", "validation", "scores"):
                    assert getattr(training, name) == values[name]
