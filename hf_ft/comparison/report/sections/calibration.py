"""Whether probabilities match frequencies: log loss, calibration error and reliability of each strategy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hf_ft.comparison.report.sections.confusion import saved_run
from hf_ft.comparison.report.text import SPLIT_NAMES, spread
from hf_ft.comparison.results import Results, Training
from hf_ft.comparison.statistics import Spread, Standing, winner
from hf_ft.documents.chart import Axis, Plot, Series
from hf_ft.documents.document import Block, Figure, Section, Table, Text
from hf_ft.documents.text import NONE, code, names, score
from hf_ft.inference.calibration import BINS, FEWEST, FILE, Bin, SplitCalibration

SPLITS = ("test", "ood")
DRAWN = 5  # fewest samples for which a bin is drawn: the accuracy of fewer means nothing
SHARES = ((0.0, "0"), (0.5, "0.5"), (1.0, "1"))
AS_TRAINED, CALIBRATED = "as trained", "calibrated"
Runs = Sequence[tuple[Training, SplitCalibration]]


def calibration(results: Results, standings: Sequence[Standing]) -> Section | None:
    """Tables and a reliability diagram for each strategy; None if there are no probabilities of single classes."""
    shown = {split: _calibrated(standings, split) for split in SPLITS}
    if not shown["test"]:
        return None
    lead = (
        "Log loss is the mean of -log p of the true class (negative log likelihood). The expected calibration error "
        f"(ECE) is the average difference between confidence and accuracy over {BINS} bins of confidence: it is 0 if "
        "80 % of the predictions with a probability of 0.8 are right, and so on. The temperature of each run, by which "
        "its logits are divided, was fitted on validation alone; it changes probabilities but no prediction. Scores "
        "are mean ± standard deviation over seeds."
    )
    blocks: list[Block] = [Text(lead), *_remarks(results, standings), calibration_table(shown["test"], "test")]
    blocks.append(reliability_figure(shown["test"]))
    if shown["ood"]:
        blocks.append(calibration_table(shown["ood"], "ood", folded=True))
    return Section("calibration", "Calibration", tuple(blocks))


def _calibrated(standings: Sequence[Standing], split: str) -> dict[str, Runs]:
    """The runs with a calibration on a split, by strategy."""
    found = {
        standing.name: [
            (run, run.calibration[split]) for run in standing.contender.finished_runs if split in run.calibration
        ]
        for standing in standings
    }
    return {name: runs for name, runs in found.items() if runs}


def _remarks(results: Results, standings: Sequence[Standing]) -> list[Text]:
    """How large an error chance alone gives, and which strategies have runs without a temperature."""
    remarks = []
    best = winner(results, standings)
    run = None if best is None else saved_run(results, best)
    if best is not None and run is not None and "test" in run.calibration:
        bins = run.calibration["test"].bins
        remarks.append(
            f"By chance alone, the ECE of a run with the probabilities of {code(best.name)} would be about "
            f"{score(by_chance(bins))} on these {sum(one.samples for one in bins):,} rows if they were exact."
        )
    missing = {s.name: [r.temperature is None for r in s.contender.finished_runs if r.calibration] for s in standings}
    without = [name for name, runs in missing.items() if any(runs)]
    if without:
        which = f"runs of {names(without)}" if not all(map(all, missing.values())) else "all runs"
        remarks.append(
            f"Without a temperature: {which}. There are too few validation samples ({FEWEST} are needed), or they "
            "determine none, as when all predictions are right."
        )
    return [Text(" ".join(remarks))] if remarks else []


def by_chance(bins: Sequence[Bin]) -> float:
    r"""The expected calibration error of exact probabilities.

    .. math:: \sum_m \frac{n_m}{N} \sqrt{\frac{2 \, c_m (1 - c_m)}{\pi \, n_m}}

    The accuracy of the :math:`n_m` samples in a bin then varies around their confidence :math:`c_m`; this is its mean
    distance from it, by the normal approximation.
    """
    total = sum(one.samples for one in bins)
    # A confidence may exceed 1 by rounding.
    variances = (one.samples * max(0.0, one.confidence * (1 - one.confidence)) for one in bins)
    return sum(math.sqrt(2 * variance / math.pi) for variance in variances) / total


def calibration_table(shown: Mapping[str, Runs], split: str, folded: bool = False) -> Table:
    """Log loss, ECE and temperature of each strategy."""
    rows = []
    for name, runs in shown.items():
        losses, errors = _both([one.log_loss for _, one in runs]), _both([one.ece for _, one in runs])
        temperatures = [run.temperature for run, _ in runs if run.temperature is not None]
        rows.append((name, *losses, *errors, _mean(temperatures)))
    headers = ("strategy", "log loss", f"log loss, {CALIBRATED}", "ECE", f"ECE, {CALIBRATED}", "temperature")
    return Table(f"Log loss and calibration on {SPLIT_NAMES[split]} data", headers, tuple(rows), folded=folded)


def _both(values: Sequence[tuple[float, ...]]) -> tuple[str, str]:
    """Over runs, as trained and calibrated; those without a temperature are left out of the latter."""
    return _mean([one[0] for one in values]), _mean([one[1] for one in values if len(one) > 1])


def _mean(values: Sequence[float]) -> str:
    return spread(Spread(dict(enumerate(values)))) if values else NONE


# --- reliability diagrams --------------------------------------------------------------------------------


def reliability_figure(shown: Mapping[str, Runs]) -> Figure:
    """Accuracy by confidence, in a small chart for each strategy."""
    axis = Axis(-0.03, 1.03, SHARES, "confidence"), Axis(-0.03, 1.03, SHARES, "accuracy")
    diagonal = Series("base", ((0.0, 0.0), (1.0, 1.0)), joined=True, marked=False)
    charts, pools = [], {}
    for name, runs in shown.items():
        found = [one for _, one in runs]
        pools[name] = pooled([one.bins for one in found]), pooled([one.calibrated_bins for one in found])
        lines = [
            Series(kind, _points(bins), joined=True, marked=False)
            for kind, bins in zip(("other", "second"), pools[name], strict=True)
        ]
        before, after = _both([one.ece for one in found])
        about = f"ECE {before} {AS_TRAINED}, {after} {CALIBRATED}"
        charts.append(Plot(name, about, (diagonal, *(line for line in lines if line.points)), *axis, small=True))
    caption = (
        "Reliability on test: the share of right predictions (vertical, 0 to 1) against the probability of the "
        "predicted class, all seeds together. On the diagonal, probabilities match frequencies; below it, the model is "
        f"overconfident. Bins with fewer than {DRAWN} samples are only in the table."
    )
    key = (
        ("other", AS_TRAINED),
        ("second", f"{CALIBRATED} by the temperature, dashed"),
        ("base", "probability = frequency"),
    )
    return Figure(caption, tuple(charts), reliability_table(pools), key)


def pooled(runs: Sequence[Sequence[Bin]]) -> dict[int, Bin]:
    """The bins of several runs merged into one set, by number."""
    found: dict[int, list[Bin]] = {}
    for one in (one for bins in runs for one in bins):
        found.setdefault(min(BINS, max(1, math.ceil(one.confidence * BINS))), []).append(one)
    return {number: _merged(found[number]) for number in sorted(found)}


def _merged(bins: Sequence[Bin]) -> Bin:
    samples = sum(one.samples for one in bins)
    confidence, accuracy = (
        sum(one.samples * getattr(one, name) for one in bins) / samples for name in ("confidence", "accuracy")
    )
    return Bin(samples, confidence, accuracy)


def _points(bins: dict[int, Bin]) -> tuple[tuple[float, float], ...]:
    return tuple((one.confidence, one.accuracy) for one in bins.values() if one.samples >= DRAWN)


def reliability_table(pools: dict[str, tuple[dict[int, Bin], dict[int, Bin]]]) -> Table:
    """The accuracy in each bin that has samples."""
    numbers = sorted({number for both in pools.values() for bins in both for number in bins})
    rows = tuple(
        (f"{name}, {what}", *(_accuracy(bins.get(number)) for number in numbers))
        for name, both in pools.items()
        for what, bins in zip((AS_TRAINED, CALIBRATED), both, strict=True)
        if bins
    )
    headers = ("strategy", *(f"to {number / BINS:.2f}" for number in numbers))
    return Table("Accuracy by confidence, and the number of samples in each bin", headers, rows, folded=True)


def _accuracy(found: Bin | None) -> str:
    return NONE if found is None else f"{found.accuracy:.2f} ({found.samples:,})"


# --- the winner's model card -----------------------------------------------------------------------------


def card_calibration(results: Results, best: Standing) -> list[Block]:
    """The calibration of the winner's saved run, for its model card; empty if there is none."""
    run = saved_run(results, best)
    found = None if run is None else run.calibration.get("test")
    if run is None or found is None:
        return []
    figures = f"log loss {score(found.log_loss[0])}, expected calibration error {score(found.ece[0])}"
    told = f"Calibration on test: {figures}."
    if run.temperature is not None:
        told += (
            f" With the temperature {run.temperature:.3g}, fitted on validation and kept in {code(FILE)}: log loss "
            f"{score(found.log_loss[1])}, error {score(found.ece[1])}. {code('hf-ft predict')} and "
            f"{code('hf_ft.calibrated(pipeline(...))')} divide logits by it; Transformers alone does not."
        )
    pools = {best.name: (pooled([found.bins]), pooled([found.calibrated_bins]))}
    rows = tuple(
        (f"{number / BINS:.2f}", _accuracy(pools[best.name][0].get(number)), _accuracy(pools[best.name][1].get(number)))
        for number in sorted({*pools[best.name][0], *pools[best.name][1]})
    )
    headers = ("confidence up to", f"accuracy {AS_TRAINED} (samples)", f"{CALIBRATED} (samples)")
    return [Text(told), Table("Reliability: accuracy by confidence", headers, rows, folded=True)]
