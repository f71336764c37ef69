"""The section of an evaluation's page on calibration."""

from __future__ import annotations

from collections.abc import Sequence

from hf_ft.documents.chart import Axis, Plot, Series
from hf_ft.documents.document import Figure, Section, Table, Text
from hf_ft.documents.text import score
from hf_ft.inference.calibration import BINS, Bin, Calibration

SHARES = tuple((tenths / 10, f"{tenths / 10:g}") for tenths in range(0, 11, 2))


def calibration_section(bins: Sequence[Bin], ece: float, calibration: Calibration | None) -> Section:
    """Whether probabilities match frequencies: the error in words, and the reliability diagram."""
    return Section("calibration", "Calibration", (Text(_told(ece, calibration)), _diagram(bins)))


def _told(ece: float, calibration: Calibration | None) -> str:
    told = f"Expected calibration error {score(ece)}: the average absolute difference between confidence and accuracy."
    if calibration is None:
        return f"{told} Probabilities are the model's own, without a temperature."
    before, after = calibration.ece
    return (
        f"{told} Logits were divided by the temperature {calibration.temperature:.3g}, which has the lowest log loss "
        f"on the {calibration.rows:,} samples of {calibration.data}; there the error was {score(before)} before and "
        f"{score(after)} after."
    )


def _diagram(bins: Sequence[Bin]) -> Figure:
    points = tuple((one.confidence, one.accuracy) for one in bins)
    plot = Plot(
        "Accuracy by confidence",
        "; ".join(f"confidence {one.confidence:.2f}: accuracy {one.accuracy:.2f}" for one in bins),
        (Series("base", ((0.0, 0.0), (1.0, 1.0)), joined=True, marked=False), Series("win", points, joined=True)),
        Axis(-0.03, 1.03, SHARES, "confidence"),
        Axis(-0.03, 1.03, SHARES, "accuracy"),
    )
    rows = tuple((score(one.confidence), score(one.accuracy), f"{one.samples:,}") for one in bins)
    table = Table(
        f"The samples in {BINS} bins of equal width", ("confidence", "accuracy", "samples"), rows, folded=True
    )
    caption = (
        "Reliability: samples by the probability of the predicted class, and the share of them that is right. On the "
        "diagonal, probabilities match frequencies; below it, the model is overconfident."
    )
    return Figure(caption, (plot,), table, (("win", "samples of a bin"), ("base", "probability = frequency")))
