"""The temperature is the one of the lowest log loss, belongs to its weights, and is applied by predictions."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from hf_ft.cli import main
from hf_ft.errors import CheckpointError
from hf_ft.inference import load_trained, predict
from hf_ft.inference.calibration import Calibration, expected_calibration_error, reliability


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

    trained = load_trained(model)
    with torch.no_grad():
        next(trained.model.parameters()).add_(1e-3)
    trained.model.save_pretrained(model)
    assert load_trained(model).calibration is None  # of other weights
    (model / "ft_calibration.json").write_text(json.dumps({**kept, "temperature": -1.0}))
    with pytest.raises(CheckpointError, match="temperature=-1.0 is not above 0"):
        load_trained(model)
    assert replace(trained, calibration=None).temperature == 1


def test_where_it_cannot_be_kept_is_told(files, capsys):
    where = ["evaluate", "--model", "user/model", "--dataset", str(files / "photos")]
    assert main([*where, "--calibrate", str(files / "photos")]) == 2
    assert "user/model is no folder here" in capsys.readouterr().err
    assert main([*where, "--calibrate_split", "test"]) == 2
    assert "--calibrate_split test has no effect" in capsys.readouterr().err
