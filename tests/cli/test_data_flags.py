"""``hf-ft train`` on a dataset with damaged images: reported before training, or left out by a flag."""

import shutil

import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_ft.cli import main, prepare
from hf_ft.cli.flags import DataFlags
from hf_ft.errors import OptionError
from hf_ft.testing.models import tiny_resnet


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    tiny_resnet().save_pretrained(root / "resnet")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "resnet")
    for folder in ("photos", "whole"):
        for name, colour in (("cat", (200, 0, 0)), ("dog", (0, 200, 0))):
            (root / folder / name).mkdir(parents=True)
            for number in range(10):
                Image.new("RGB", (32, 32), colour).save(root / folder / name / f"{number}.png")
    (root / "photos" / "dog" / "9.png").write_bytes(b"")
    return root


def run(files, output, *more):
    where = ["--model", str(files / "resnet"), "--dataset", str(files / "photos"), "--output_dir", str(output)]
    return main(["train", *where, "--max_steps", "1", "--use_cpu", "true", *more])


@pytest.mark.slow
def test_damaged_images_are_reported_before_training_or_left_out(files, tmp_path, capsys):
    assert run(files, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "1 of 20 images cannot be read: " in error and "dog/9.png" in error and "--on_corrupt skip" in error
    assert not (tmp_path / "out").exists()
    assert run(files, tmp_path / "out", "--on_corrupt", "skip") == 0
    found = capsys.readouterr()
    out = " ".join(found.out.split())  # without the wrapping of a terminal
    assert "They are skipped." in found.err and ("15 train, 4 val" in out or "16 train, 3 val" in out)
    assert "checks" in out and "equal to others in it" in out and "out/data_checks.json" in out.replace(" ", "")
    assert (tmp_path / "out" / "data_checks.json").is_file()
    assert run(files, tmp_path / "no", "--on_corrupt", "drop") == 2
    assert "--on_corrupt drop is unknown: choose one of refuse, skip." in capsys.readouterr().err


def test_duplicates_are_refused_or_left_out(files, tmp_path, capsys):
    """All photos of a class are the same."""
    whole = ["--dataset", str(files / "whole"), "--on_duplicates"]
    assert run(files, tmp_path / "out", *whole, "refuse") == 2
    error = capsys.readouterr().err
    assert "14 samples of train equal to others in it" in error and "or set --on_duplicates" in error
    assert run(files, tmp_path / "out", *whole, "drop") == 2  # the folder with the list may already exist
    assert "all training samples are duplicates that" in capsys.readouterr().err
    assert run(files, tmp_path / "out", *whole, "keep") == 2
    assert "choose one of warn, drop, refuse, ignore" in capsys.readouterr().err


def test_duplicates_among_many_samples_are_looked_for_on_request(files, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHECKED_UNASKED", 19)
    flags = DataFlags(dataset=str(files / "whole"))
    data = prepare.read_data(flags)
    unasked = prepare.check_data(data, flags, prepare.prints_for(flags), tmp_path).checks
    assert unasked.sentences()[0].startswith("duplicates are not searched for in 20 samples: add --on_duplicates")
    flags = DataFlags(dataset=str(files / "whole"), on_duplicates="warn")
    asked = prepare.check_data(data, flags, prepare.prints_for(flags), tmp_path)
    assert asked.checks.duplicates and asked.splits is data.splits


@pytest.mark.newest  # the oldest datasets versions do not read a folder's metadata.csv
def test_the_trainer_knows_the_groups(files, tmp_path, monkeypatch, capsys):
    rows = ["file_name,label,patient"]
    for number in range(24):
        Image.new("RGB", (32, 32), (number, 9, 99)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'cat' if number % 2 else 'dog'},{number % 5}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    given = {}

    def refused(*arguments, **more):
        given.update(more)
        raise OptionError("seen")

    monkeypatch.setattr(prepare, "FTTrainer", refused)
    where = ["--dataset", str(tmp_path), "--group_column", "patient", "--on_duplicates", "ignore"]
    assert run(files, tmp_path / "out", *where) == 2 and "seen" in capsys.readouterr().err
    train = prepare.read_data(DataFlags(dataset=str(tmp_path), group_column="patient")).splits["train"]
    patients = train.with_format(None)["patient"][:]
    same = [[one == other for other in patients] for one in patients]
    assert (given["groups"][:, None] == given["groups"]).tolist() == same and 2 < len(set(patients)) < 5


@pytest.mark.slow
def test_damaged_source_images_are_reported(files, tmp_path, capsys):
    source = ["--dataset", str(files / "whole"), "--source_dataset", str(files / "photos")]
    assert run(files, tmp_path / "out", *source) == 2
    assert run(files, tmp_path / "out", "--on_corrupt", "skip", *source) == 0
    assert capsys.readouterr().err.count("1 of 20 images cannot be read: train, row 19") == 2


@pytest.mark.slow
def test_many_images_are_checked_only_on_request(files, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(prepare, "CHECKED_UNASKED", 19)
    monkeypatch.setattr(
        prepare, "check_images", lambda splits, columns, how, prints: opened.append(how) or (splits, {})
    )
    assert run(files, tmp_path / "out", "--strategy", "linear_probe") == 2  # in the middle, at the damaged one
    assert opened == [] and "cannot read the image in row 19" in capsys.readouterr().err
    run(files, tmp_path / "out", "--overwrite", "--on_corrupt", "refuse")
    assert opened == ["refuse"]
    monkeypatch.setattr(prepare, "CHECKED_UNASKED", 20)
    run(files, tmp_path / "out", "--overwrite")
    assert opened == ["refuse", "refuse"]


@pytest.mark.parametrize("command", ["train", "advise", "compare", "search-blocks"])
def test_truncated_weights_end_in_one_line(files, tmp_path, capsys, command):
    model = shutil.copytree(files / "resnet", tmp_path / "model")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    where = ["--model", str(model), "--dataset", str(files / "whole"), "--output_dir", str(tmp_path / "out")]
    assert main([command, *where, "--use_cpu", "true"]) == 2
    assert f"error: {model / 'model.safetensors'} is damaged (" in capsys.readouterr().err.splitlines()[-1]
