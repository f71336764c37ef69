"""``hf-ft predict`` and ``hf-ft evaluate``: what is written, reported and refused."""

import csv
import json
import shutil

import pytest

from hf_ft.cli import main
from tests.trained import CLASSES, TRUTH, trained_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return trained_files(tmp_path_factory.mktemp("files"))


def call(command, model, data, *more):
    return main([command, "--model", str(model), "--dataset", str(data), "--device", "cpu", *map(str, more)])


def test_predictions_go_to_stdout_or_a_file_and_damaged_files_are_reported(files, tmp_path, capsys):
    shutil.copytree(files / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "2.png").write_bytes(b"")
    assert call("predict", files / "resnet", tmp_path / "photos", "--top_k", "2", "--batch_size", "5") == 0
    out, told = capsys.readouterr()
    rows = list(csv.DictReader(out.splitlines()))
    assert list(rows[0]) == ["file", "label", "probability", "label_2", "probability_2", "true_label", "error"]
    assert [row["true_label"] for row in rows] == [CLASSES[number] for number in TRUTH]
    assert not rows[2]["label"] and "not an image" in rows[2]["error"] and not rows[3]["error"]
    assert "1 of 12 samples cannot be read" in told and "11 rows with a label: accuracy" in told

    file = tmp_path / "answers.jsonl"
    assert call("predict", files / "resnet", files / "photos" / "dog" / "0.png", "--output", file, "--tta") == 0
    (line,) = map(json.loads, file.read_text().splitlines())
    assert set(line) == {"file", "label", "probability"} and line["label"] in CLASSES
    assert call("predict", files / "resnet", files / "photos", "--output", file) == 0  # its own file
    assert len(file.read_text().splitlines()) == 12 and not list(tmp_path.glob("*.part"))
    notes = tmp_path / "notes.csv"
    notes.write_text("file,note\na,b\n")
    assert call("predict", files / "resnet", files / "photos", "--output", notes) == 2
    assert "this command did not write it: give another file, or add --overwrite" in capsys.readouterr().err
    assert call("predict", files / "resnet", files / "photos", "--output", notes, "--overwrite") == 0


def test_a_table_of_texts_is_predicted_by_row(files, capsys):
    assert call("predict", files / "bert", files / "reviews.csv", "--text_column", "body") == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["row"] for row in rows] == [str(row) for row in range(10)] and rows[0]["true_label"] == "good"


def test_an_evaluation_is_a_page_with_its_scores(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("evaluate", files / "resnet", files / "photos", "--output_dir", out) == 0
    content = json.loads((out / "evaluation.json").read_text())
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    right = sum(row["label"] == row["true_label"] for row in rows)
    assert content["scores"]["accuracy"] == pytest.approx(right / 12)
    assert content["confusion"]["classes"] == list(CLASSES)
    assert f"{content['scores']['log_loss']:.4f}" in capsys.readouterr().out
    page = (out / "evaluation.html").read_text()
    assert "Made by <code>hf-ft evaluate</code>" in page and "hf-ft compare" not in page
    assert "Confusion matrix" in page and str(tmp_path) not in page and "predicted eel" in page
    assert f"{right} of 12 predictions are correct" in (out / "evaluation.md").read_text()
    assert call("evaluate", files / "resnet", files / "photos", "--output_dir", out) == 0  # once more
    for name in ("evaluation.json", "evaluation.html", "evaluation.md"):
        written = (out / name).read_text()
        (out / name).write_text('{"mine": 1}')
        assert call("evaluate", files / "resnet", files / "photos", "--output_dir", out) == 2
        assert f"{name} exists, and this command did not write it: give another folder" in capsys.readouterr().err
        assert (out / name).read_text() == '{"mine": 1}'
        (out / name).write_text(written)
    (out / name).write_text("# Mine\n")
    assert call("evaluate", files / "resnet", files / "photos", "--output_dir", out, "--overwrite") == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--top_k", "4"], "top_k=4: the model has 3 classes"),
        (["--threshold", "0.3"], "--threshold 0.3 has no effect"),
        (["--max_length", "8"], "--max_length 8 has no effect: the model classifies image data"),
        (["--ttaa"], "--ttaa is unknown. Did you mean --tta?"),
        (["--output", "answers.txt"], "--output answers.txt ends in neither .csv nor .jsonl"),
        (["--batch_size", "0"], "--batch_size 0 is too small"),
        (["--base", "x"], "has no effect, since"),
        (["--device", "cuda:99"], "cuda:99 cannot be used"),
    ],
)
def test_what_has_no_effect_is_refused(more, told, files, capsys):
    assert call("predict", files / "resnet", files / "photos", *more) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("model", "data", "told"),
    [
        ("nothing", "photos", "cannot read the model"),
        ("resnet", "nothing", "is not a local file or folder"),
        ("resnet", "reviews.csv", "set --image_column"),
        ("resnet", "texts", "there are no images in"),
        ("bert", "reviews.csv", "no image, audio or text column"),
    ],
)
def test_missing_files_are_reported_in_one_line(model, data, told, files, capsys):
    assert call("predict", files / model, files / data) == 2
    err = capsys.readouterr().err
    assert told in " ".join(err.split()) and len(err.strip().splitlines()) == 1
