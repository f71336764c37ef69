"""What commands write for others to read names no folder or user of this machine, and contains no secret."""

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_ft.cli import main
from hf_ft.testing.models import tiny_resnet

USER, SECRET = "ann-on-this-machine", "hf_plantedplantedplanted"
# Files for this machine only: studies, and checkpoints to resume from.
LOCAL = (".db", ".lock", "trainer_state.json")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with photos and two models."""
    home, rng = tmp_path_factory.mktemp(USER), np.random.default_rng(0)
    for split, number in (("train", 12), ("validation", 6), ("test", 6)):
        for index, name in enumerate(("cat", "dog")):
            (home / "photos" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(100 * index)
                Image.fromarray(pixels).save(home / "photos" / split / name / f"{i}.png")
    for name in ("resnet", "other"):
        tiny_resnet().save_pretrained(home / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(home / name)
    return home


def leaks(folder):
    """The files in a folder that contain the user's name or the secret."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(LOCAL)]
    assert files
    return [
        str(file.relative_to(folder))
        for file in files
        if any(word.encode() in file.read_bytes() for word in (USER, SECRET))
    ]


@pytest.mark.slow
def test_commands(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    usual = ["--dataset", str(home / "photos"), "--num_train_epochs", "1", "--per_device_train_batch_size", "8"]
    usual += ["--use_cpu", "true"]
    model, other = ["--model", str(home / "resnet")], str(home / "other")

    out = home / "compare"
    studies = [
        "--storage",
        str(home / "studies.db"),
        "--trials",
        "1",
        "--seeds",
        "1",
        "--folds",
        "1",
        "--advise",
        "true",
    ]
    amcf = ["--amcf.source_models", f"{home / 'resnet'},{other}", "--amcf.frozen", "0,0"]
    chosen = ["--strategies", "linear_probe,blockwise,amcf,tred", "--blockwise.block", "last_quarter"]
    chosen += ["--project", str(home / "run")]
    assert main(["compare", *model, *usual, *studies, *amcf, *chosen, "--output_dir", str(out)]) == 0
    assert leaks(out) == []
    assert "photos" in (out / "report.md").read_text() and "--storage" not in (out / "report.md").read_text()

    out = home / "train"
    search = ["--blockwise.storage", str(home / "blocks.db"), "--blockwise.search_epochs", "1"]
    search += ["--hub_token", SECRET]
    assert main(["train", *model, *usual, *search, "--strategy", "blockwise", "--output_dir", str(out)]) == 0
    assert leaks(out) == []

    out = home / "ensemble"
    members = ["--amcf.source_models", f"{home / 'resnet'},{other}", "--amcf.frozen", "0,0"]
    assert main(["train", *usual, *members, "--strategy", "amcf", "--output_dir", str(out)]) == 0
    assert leaks(out) == []

    out = home / "advice"
    assert main(["advise", *model, *usual[:2], "--output_dir", str(out)]) == 0
    assert leaks(out) == []

    out = home / "search"
    assert main(["search-blocks", *model, *usual[:2], *usual[4:], *search, "--output_dir", str(out)]) == 0
    assert leaks(out) == []
