"""A full disk while a model is saved: one line, status 2, nothing incomplete, no resuming without a checkpoint."""

import errno
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_ft.cli import main
from hf_ft.testing.models import tiny_resnet


@pytest.fixture(autouse=True)
def clean(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    logging.getLogger("hf_ft").handlers.clear()


@pytest.fixture
def command(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    tiny_resnet().save_pretrained(tmp_path / "resnet")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "resnet")
    given = {"model": tmp_path / "resnet", "dataset": tmp_path / "photos", "output_dir": tmp_path / "out"}
    given |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "use_cpu": "true", "eval_strategy": "no"}
    given |= {"load_best_model_at_end": "false"}
    return ["train", *(f"--{name}={value}" for name, value in given.items())]


@pytest.fixture
def full(monkeypatch):
    """The disk is full from the n-th weights file on."""
    written = []

    def fill(number):
        write = safetensors.torch.serialize_file

        def serialize_file(*args, **kwargs):
            written.append(args[1])
            if len(written) >= number:
                Path(args[1]).write_bytes(b"cut off")
                raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
            write(*args, **kwargs)

        monkeypatch.setattr("safetensors.torch.serialize_file", serialize_file)

    return fill


@pytest.mark.slow
@pytest.mark.parametrize(("number", "checkpoints"), [(1, []), (3, ["checkpoint-2"]), (5, ["checkpoint-3"])])
def test_while_saving(number, checkpoints, command, full, tmp_path, capsys, monkeypatch):
    full(number)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "hf-ft train: error: I/O error: No space left on device" in said and "Traceback" not in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*checkpoints, "data_checks.json"]
    monkeypatch.undo()
    resume = [*command, "--resume_from_checkpoint=true"]
    if checkpoints:
        assert main(command) == 2
        assert "--resume_from_checkpoint true to continue" in capsys.readouterr().err
        assert main(resume) == 0
    else:
        assert main(command) == 0  # nothing is in the way


def test_a_folder_without_a_checkpoint_is_not_resumed(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert main(command) == 2
    assert "is not empty: add --overwrite, or name another folder" in capsys.readouterr().err


def test_other_errors_keep_their_traceback(command, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("hf_ft.cli.train.run_train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(command)
    monkeypatch.setattr("hf_ft.cli.train.run_train", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert main(command) == 2
