"""The examples run; those for several processes run with two."""

import json
from pathlib import Path

import numpy as np
import optuna
import pytest
from PIL import Image
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertTokenizer,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
)

from hf_ft.comparison.results import Results
from hf_ft.search.storage import open_storage
from hf_ft.testing import tiny_bert, tiny_resnet, tiny_vit
from hf_ft.testing.families import tiny
from tests.forked import python

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINING = ["--use_cpu", "True", "--num_train_epochs", "2", "--save_strategy", "no", "--report_to", "none"]
TRAINING += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]


def run(folder, example, *arguments, ranks=1):
    done = python(EXAMPLES / example, *arguments, ranks=ranks, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_all_are_short():
    for example in EXAMPLES.glob("*.py"):
        limit = {"raw_accelerate_loop": 60, "own_strategy": 60}.get(example.stem, 120)
        assert len(example.read_text().splitlines()) <= limit, example.name


@pytest.mark.slow
def test_compose(tmp_path):
    lines = run(tmp_path, "compose.py").splitlines()
    shown = [line for line in lines if line.startswith("step ")]
    assert len(shown) == 12 and "stage 0" in shown[0] and "stage 1" in shown[-1]
    assert "loss/l2_sp 0.0000" in shown[0] and "loss/l2_sp 0.0000" not in shown[-1]


@pytest.mark.slow
def test_own_strategy(tmp_path):
    assert "loss/feature_norm" in run(tmp_path, "own_strategy.py")


@pytest.mark.slow
def test_raw_loop(tmp_path):
    assert "2 process(es), epoch 3: task" in run(tmp_path, "raw_accelerate_loop.py", "--cpu", ranks=2)
    AutoModelForImageClassification.from_pretrained(tmp_path / "runs" / "raw_loop")


def photos(folder, labels=("dark", "light")):
    random = np.random.default_rng(0)
    for shade, label in enumerate(labels):
        (folder / label).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(80 * shade, 80 * shade + 80, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")


@pytest.mark.slow
def test_soft_on_two_ranks(tmp_path):
    photos(tmp_path / "photos")
    photos(tmp_path / "source", ("high", "low", "mid"))
    names = dict(enumerate(["low", "mid", "high"]))
    tiny_vit(id2label=names, label2id={v: k for k, v in names.items()}).save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    arguments = ["--model", "base", "--data", "photos", "--source", "source", "--output_dir", "out"]
    out = run(tmp_path, "soft.py", *arguments, *TRAINING, "--logging_steps", "1", ranks=2)
    assert "2 process(es), accuracy" in out and "loss/source" in out
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "dark", 1: "light"}


@pytest.mark.slow
def test_amcf_on_two_ranks(tmp_path):
    photos(tmp_path / "photos")
    for name, make, mean in (("one", tiny_vit, 0.5), ("two", tiny_resnet, 0.3)):
        make().save_pretrained(tmp_path / name)
        ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[mean] * 3).save_pretrained(tmp_path / name)
    arguments = ["--sources", "one", "two", "--data", "photos", "--output_dir", "out"]
    search = ["--particles", "2", "--iterations", "1", "--search_epochs", "1"]
    out = run(tmp_path, "amcf.py", *arguments, *search, *TRAINING, "--logging_steps", "1", ranks=2)
    assert "2 process(es), accuracy" in out and "loss/consistency" in out and "layers of one and" in out
    assert "a plain checkpoint: ViTForImageClassification" in out
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.inputs == [0, 1]


@pytest.mark.slow
def test_compare_with_two_workers(tmp_path):
    photos(tmp_path / "photos")
    tiny_resnet().save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    arguments = ["--model", "base", "--data", "photos", "--strategies", "linear_probe", "--output_dir", "out"]
    budget = ["--trials", "1", "--seeds", "2", "--folds", "1", "--num_train_epochs", "1", "--use_cpu", "True"]
    out = run(tmp_path, "compare.py", *arguments, *budget, "--storage", "out.log", ranks=2)
    assert out.count("linear_probe: validation") == 1 and out.count("2 worker(s), winner: ") == 1
    assert {"report.html", "report.md", "results.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    names = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "best").config.id2label
    assert names == {0: "dark", 1: "light"}
    study = optuna.load_study(study_name="compare", storage=open_storage(str(tmp_path / "out.log")))
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert len(done) == 6  # two strategies, each with a trial and two final runs: no run was trained by both workers


@pytest.mark.slow
def test_train_image_on_two_ranks(tmp_path):
    photos(tmp_path / "photos")
    tiny_vit().save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    arguments = ["--model", "base", "--data", "photos", "--strategy", "lp_ft", "l2_sp", "--output_dir", "out"]
    out = run(tmp_path, "train_image.py", *arguments, *TRAINING, ranks=2)
    assert "2 process(es), accuracy" in out
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "dark", 1: "light"}


@pytest.mark.slow
def test_train_text_on_two_ranks(tmp_path):
    words = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    rows = [f"{words[i % 3]} film,yes" for i in range(10)] + [f"{words[3 + i % 3]} plot,no" for i in range(10)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    tiny_bert().save_pretrained(tmp_path / "base")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "base")
    arguments = ["--model", "base", "--data", "reviews.csv", "--strategy", "gradual_unfreezing", "--output_dir", "out"]
    out = run(tmp_path, "train_text.py", *arguments, *TRAINING, ranks=2)
    assert "2 process(es), accuracy" in out
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_own_search_shows_its_table_and_plot(tmp_path):
    """As the package's own do: printed, in the model card with the picture, and in the report with its chart."""
    photos(tmp_path / "photos")
    tiny_resnet().save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    name, caption = "backbone_rate", "accuracy on held-out training samples"
    common = ["--model", "base", "--dataset", "photos", "--num_train_epochs", "1", "--use_cpu", "true"]
    given = ["train", "--strategy", name, "--disable_tqdm", "true"]
    out = run(tmp_path, "own_search.py", *given, *common, "--output_dir", "out")
    scores = json.loads((tmp_path / "out" / "backbone_rate.json").read_text())
    assert [score["factor"] for score in scores] == [0.01, 0.1, 1.0]
    accuracy = f"{scores[0]['accuracy']:.3f}"
    assert f"{caption}:\n\nbackbone's rate  accuracy\n" in out and f"\n0.01             {accuracy}\n" in out
    assert "In out: backbone_rate.json, backbone_rate.png." in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**{caption}**\n\n| backbone's rate | accuracy |" in card and f"| 0.01 | {accuracy} |" in card
    assert "![backbone_rate](backbone_rate.png)" in card and "times the head's learning rate." in card
    assert (tmp_path / "out" / "backbone_rate.png").read_bytes().startswith(b"\x89PNG")

    given = ["compare", "--strategies", name, "--trials", "1", "--seeds", "1", "--folds", "1"]
    run(tmp_path, "own_search.py", *given, *common, "--output_dir", "compared")
    folder = tmp_path / "compared"
    found = Results.load(folder / "results.json")[name].found["scores"]
    accuracy = f"{found[0]['accuracy']:.3f}"
    report, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert "| backbone's rate | accuracy |" in report and f"| 0.01 | {accuracy} |" in report
    assert caption in page and "Accuracy by rate" in page and "<svg" in page


@pytest.mark.slow
def test_audio_on_tones(tmp_path):
    pytest.importorskip("soundfile")
    tiny("Wav2Vec2ForSequenceClassification", num_hidden_layers=4).base_model.save_pretrained(tmp_path / "base")
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path / "base")
    out = run(tmp_path, "train_audio.py", "--model", "base", "--output_dir", "out", *TRAINING)
    assert "accuracy 1.000" in out
    loaded = AutoModelForAudioClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label == {0: "high", 1: "low"}
