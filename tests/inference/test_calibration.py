"""The temperature minimises the log loss, belongs to its weights, and is applied to predictions."""

import json
import shutil
from dataclasses import replace
from operator import itemgetter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy
from transformers import pipeline

import hf_ft
from hf_ft.cli import main
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.inference import load_trained, predict
from hf_ft.inference.calibration import (
    Calibration,
    SplitCalibration,
    expected_calibration_error,
    reliability,
    takes_temperature,
    unasked_temperature,
)
from tests.trained import CLASSES


def test_the_expected_calibration_error_by_hand():
    confidence, correct = np.array([0.5, 0.55, 0.6, 0.95, 1.0]), np.array([1, 0, 1, 1, 0])
    # Bins of a tenth: (0.4, 0.5], (0.5, 0.6], (0.9, 1.0].
    wanted = (1 * 0.5 + 2 * abs(0.575 - 0.5) + 2 * abs(0.975 - 0.5)) / 5
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(wanted)
    assert [one.samples for one in reliability(confidence, correct, bins=10)] == [1, 2, 2]


def test_the_temperature_has_the_lowest_log_loss():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 3, generator=random, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=random)[:, 0]
    found = Calibration.fitted(4 * logits, labels, "data", "x")
    best = minimize_scalar(lambda t: float(cross_entropy(4 * logits / t, labels)), bounds=(0.05, 20), method="bounded")
    assert found.temperature == pytest.approx(best.x, rel=1e-3) and 3 < found.temperature < 5
    assert found.log_loss[1] == pytest.approx(best.fun, abs=1e-9) and found.ece[1] < found.ece[0] / 2


@pytest.mark.slow
def test_evaluate_keeps_it_and_predict_applies_it(files, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(files / "resnet", model)
    plain = np.stack([one.outputs for one in predict(model, files / "photos")])
    arguments = ["evaluate", "--model", str(model), "--dataset", str(files / "photos"), "--output_dir"]
    assert main([*arguments, str(tmp_path / "out"), "--calibrate", str(files / "photos"), "--device", "cpu"]) == 0
    kept = json.loads((model / "ft_calibration.json").read_text())
    assert f"temperature {kept['temperature']:.4g}" in capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "evaluation.json").read_text())["scores"]
    assert scores["log_loss"] == pytest.approx(kept["log_loss"][1]) and scores["ece"] == pytest.approx(kept["ece"][1])
    assert "Accuracy by confidence" in (tmp_path / "out" / "evaluation.html").read_text()

    wanted = torch.softmax(torch.tensor(plain).log() / kept["temperature"], 1).numpy()
    assert np.abs(wanted - plain).max() > 1e-4
    np.testing.assert_allclose([one.outputs for one in predict(model, files / "photos")], wanted, atol=1e-9)
    off = [one.outputs for one in predict(model, files / "photos", calibrated=False)]
    np.testing.assert_allclose(off, plain, atol=1e-12)

    plain_pipeline = pipeline("image-classification", model=str(model), device="cpu", top_k=3)
    classify = hf_ft.calibrated(plain_pipeline)
    photos = [str(one.file) for one in predict(model, files / "photos")]
    for answers in (classify(photos), classify(photos, batch_size=5), list(map(classify, photos))):
        scores = [[dict(map(itemgetter("label", "score"), one))[name] for name in CLASSES] for one in answers]
        np.testing.assert_allclose(scores, wanted, atol=1e-5)
    first = {one["label"]: one["score"] for one in plain_pipeline(photos[0])}
    np.testing.assert_allclose([first[name] for name in CLASSES], plain[0], atol=1e-5)  # the given one is as it was

    trained = load_trained(model)
    with torch.no_grad():
        next(trained.model.parameters()).add_(1e-3)
    trained.model.save_pretrained(model)
    assert load_trained(model).calibration is None  # for other weights
    other = pipeline("image-classification", model=str(model), device="cpu")
    with pytest.raises(OptionError, match="fitted to other weights"):
        hf_ft.calibrated(other)
    assert hf_ft.calibrated(other, temperature=1e3)(photos[0])[0]["score"] == pytest.approx(1 / 3, abs=1e-2)
    (model / "ft_calibration.json").write_text(json.dumps({**kept, "temperature": -1.0}))
    with pytest.raises(CheckpointError, match="temperature=-1.0 is not above 0"):
        load_trained(model)
    assert replace(trained, calibration=None).temperature == 1


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        (
            "multi_label_classification",
            "image-classification",
            "is one of multi_label_classification: a temperature is",
        ),
        ("regression", "text-classification", "is one of regression"),
        (None, "image-to-text", "pipeline='image-to-text' gives no class probabilities: pass one of image-cl"),
        (None, "image-classification", "nowhere has no ft_calibration.json: fit a temperature with `hf-ft evaluate"),
    ],
)
def test_pipelines_that_have_no_temperature(kind, task, message):
    config = SimpleNamespace(problem_type=kind, num_labels=3, _commit_hash=None)
    given = SimpleNamespace(task=task, model=SimpleNamespace(config=config, name_or_path="nowhere"))
    with pytest.raises(OptionError, match=message):
        hf_ft.calibrated(given)
    with pytest.raises(OptionError, match=message if "nowhere" not in message else "temperature=0 must be above 0"):
        hf_ft.calibrated(given, temperature=0)


def test_no_temperature_by_default_if_samples_do_not_determine_it():
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(40, 3, generator=random, dtype=torch.float64)
    labels = torch.multinomial((logits / 4).softmax(1), 1, generator=random)[:, 0]
    assert unasked_temperature(logits, labels)[0] == Calibration.fitted(logits, labels, "data", "x").temperature
    few = unasked_temperature(logits[:29], labels[:29])
    assert few == (None, "29 validation samples are too few for a temperature, which needs 30")
    assert unasked_temperature(logits, logits.argmax(1)) == (
        None,
        "40 validation samples do not determine a temperature",
    )
    assert unasked_temperature(logits / 0.0, labels)[0] is None
    assert takes_temperature(logits.numpy(), labels.numpy())
    assert not takes_temperature(logits.numpy(), logits.softmax(1).numpy())  # shares of classes
    assert not takes_temperature(logits[:, :1].numpy(), labels.double().numpy())


def test_calibration_of_a_split_before_and_after():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 3, generator=random, dtype=torch.float64)
    labels = torch.randint(0, 3, (60,), generator=random)
    found = SplitCalibration.of(logits, labels, 2.5)
    for index, z in enumerate((logits, logits / 2.5)):
        p = z.softmax(1).numpy()
        assert found.log_loss[index] == pytest.approx(-np.mean(np.log(p[np.arange(60), labels])))
        correct = p.argmax(1) == labels.numpy()
        assert found.ece[index] == pytest.approx(expected_calibration_error(p.max(1), correct))
        assert list((found.bins, found.calibrated_bins)[index]) == reliability(p.max(1), correct)
    assert SplitCalibration.of(logits, labels).log_loss == found.log_loss[:1]


def test_it_is_reported_if_it_cannot_be_saved(files, capsys):
    where = ["evaluate", "--model", "user/model", "--dataset", str(files / "photos")]
    assert main([*where, "--calibrate", str(files / "photos")]) == 2
    assert "user/model is not a local folder" in capsys.readouterr().err
    assert main([*where, "--calibrate_split", "test"]) == 2
    assert "--calibrate_split test has no effect" in capsys.readouterr().err
