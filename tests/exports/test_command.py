"""``hf-ft export``: what is reported and what is refused."""

import json

import pytest

from hf_ft.cli import main


def call(model, out, *more):
    return main(["export", "--model", str(model), "--output_dir", str(out), "--formats", "pt2", *map(str, more)])


@pytest.mark.slow
@pytest.mark.usefixtures("traced_before")
def test_files_and_differences_are_reported(files, tmp_path, capsys):
    assert call(files / "resnet", tmp_path / "a", "--dataset", files / "photos", "--samples", 6) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "a" / "export.json").read_text())
    assert content["check"]["samples"] == 6 and content["check"]["data"] == "photos"
    assert "Compared on 6 samples of photos, in batches of 1, 3, 6." in out
    (line,) = (line.split() for line in out.splitlines() if line.startswith("model.pt2"))
    assert line[-2:] == ["100.0%", f"{content['check']['scores']['accuracy']:.4f}"]
    assert call(files / "resnet", tmp_path / "a") == 2
    assert "model.pt2 exists: name another folder, or set --overwrite" in capsys.readouterr().err
    assert call(files / "resnet", tmp_path / "a", "--overwrite") == 0
    out, told = capsys.readouterr()
    assert "samples of random samples" not in out and "6 random samples" in out
    assert "give your own samples with --dataset" in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--quantize", "int4"], "--quantize int4: only int8 is supported"),
        (["--formats", "tflite"], "formats"),
        (["--split", "test"], "--split test has no effect: no --dataset"),
        (["--max_length", "8"], "--max_length 8 has no effect: the model classifies image data"),
        (["--tolerance", "2"], "tolerance"),
        (["--sample", "2"], "Did you mean --samples?"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(more, told, files, tmp_path, capsys):
    assert call(files / "resnet", tmp_path / "out", *more) == 2
    err = capsys.readouterr().err
    assert told in " ".join(err.split()) and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
