"""The second half of a report: how the scores came about. Learning curves, tuning, and how far the features moved."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from hf_ft.comparison.charts import Axis, Plot, Series, linear_axis, log_axis
from hf_ft.comparison.document import Block, Figure, Section, Table, Text
from hf_ft.comparison.outcome import kind_of
from hf_ft.comparison.results import BASELINE, Contender, Results, Training
from hf_ft.comparison.statistics import Standing, winner
from hf_ft.comparison.wording import NONE, SPLIT_NAMES, metric_name, plain, score, seconds

RATE = "learning_rate"
MEASURES = {"relative_l2": "distance", "cosine": "cosine"}
BLOCK_COLUMNS = 12  # of the table of distortion; more blocks are listed below each other
CURVE_COLUMNS = 16  # of the table; of more epochs, so many are listed


def process_sections(results: Results, found: Sequence[Standing]) -> list[Section]:
    """All sections of this half that have something to show."""
    made = (learning_curves(results, found), tuning(results, found))
    return [section for section in made if section is not None]


# --- learning curves -------------------------------------------------------------------------------------


def mean_curve(runs: Sequence[Training]) -> dict[float, float]:
    """Validation score by epoch, the mean over the runs that were evaluated then."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for point in run.curve:
            value = point.get("validation")
            if value is not None and math.isfinite(value):
                found.setdefault(round(point["epoch"], 2), []).append(value)
    return {epoch: statistics.fmean(found[epoch]) for epoch in sorted(found)}


def learning_curves(results: Results, found: Sequence[Standing]) -> Section | None:
    """A small chart for each contender, with full fine-tuning's curve behind."""
    curves = {standing.name: mean_curve(standing.contender.finished_runs) for standing in found}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    best, metric = winner(results, found), metric_name(results.metric)
    x = linear_axis([epoch for curve in curves.values() for epoch in curve], "epoch", most=4, include=[0.0])
    y = linear_axis([value for curve in curves.values() for value in curve.values()], metric, most=4)
    behind = (Series("full", tuple(curves.get(BASELINE, {}).items()), joined=True, marked=False),)
    charts = []
    for standing in found:
        curve = curves.get(standing.name)
        if not curve:
            continue
        own = Series(kind_of(standing, best), tuple(curve.items()), joined=True)
        series = (own,) if standing.name == BASELINE else (*behind, own)
        top = (max if results.greater_is_better else min)(curve, key=lambda epoch: curve[epoch])
        about = f"from {score(next(iter(curve.values())))} to {score(curve[top])} at epoch {top:g}"
        strong = series[-1].kind == "win"
        charts.append(Plot(standing.name, about, series, x, y, small=True, strong=strong))
    caption = f"Validation {metric} after each epoch, the mean over seeds. All charts have the same axes."
    key = [("win", "the winner"), ("other", "others"), ("full", "full fine-tuning, the line behind each")]
    figure = Figure(caption, tuple(charts), curve_table(curves), tuple(key))
    lead = "The best epoch of each run counts. A curve that still rises at the end asks for more epochs."
    return Section("curves", "Learning curves", (Text(lead), figure))


def curve_table(curves: Mapping[str, Mapping[float, float]]) -> Table:
    """Means by contender and epoch."""
    epochs = sorted({epoch for curve in curves.values() for epoch in curve})
    if len(epochs) > CURVE_COLUMNS:
        step = (len(epochs) - 1) / (CURVE_COLUMNS - 1)
        epochs = sorted({epochs[round(i * step)] for i in range(CURVE_COLUMNS)})
    rows = tuple((name, *(score(curve.get(epoch)) for epoch in epochs)) for name, curve in curves.items())
    return Table("Mean validation score by epoch", ("strategy", *(f"{e:g}" for e in epochs)), rows, folded=True)


# --- tuning ----------------------------------------------------------------------------------------------


def tuning(results: Results, found: Sequence[Standing]) -> Section | None:
    """What was tried, what was chosen, and where a range was too small."""
    tuned = [standing for standing in found if standing.contender.trials]
    if not tuned:
        return None
    lead = (
        "Each strategy had the same budget of seconds of computing for its trials, its look at the data included. The "
        "trial with the best validation score set the options of the final runs."
    )
    edges = [standing.name for standing in tuned if standing.contender.on_edge]
    warning = (
        f"For {', '.join(edges)} a chosen value lies on the edge of its range: a better one may lie beyond, so their "
        "scores may be too low."
    )
    figure = trials_figure(results, tuned, winner(results, found))
    blocks: list[Block] = [Text(lead), *([Text(warning)] if edges else []), tuning_table(tuned)]
    blocks += [figure] if figure else []
    return Section("tuning", "Tuning", (*blocks, trials_table(tuned)))


def tuning_table(tuned: Sequence[Standing]) -> Table:
    """Budget and choice of each contender."""
    rows: list[tuple[str, ...]] = []
    for standing in tuned:
        contender, failed = standing.contender, standing.failed_trials
        chosen = None if contender.chosen is None else contender.trials[contender.chosen]
        edge = "; ".join(
            f"{name} is on the edge of {contender.space.get(name, 'its range')}" for name in contender.on_edge
        )
        rows.append(
            (
                standing.name,
                f"{len(contender.trials)}" + (f" ({failed} failed)" if failed else ""),
                f"{seconds(contender.tuning_seconds)} of {seconds(contender.allowed_seconds)}",
                NONE if chosen is None else score(chosen.validation),
                NONE if chosen is None else options(chosen.params),
                edge or NONE,
            )
        )
    headers = ("strategy", "trials", "seconds of allowed", "validation", "chosen", "warning")
    return Table("Budget and choice", headers, tuple(rows))


def options(params: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {plain(value)}" for name, value in params.items()) or "nothing to choose"


def trials_figure(results: Results, tuned: Sequence[Standing], best: Standing | None) -> Figure | None:
    """Validation score against learning rate, a small chart for each contender."""
    trials = {standing.name: _with_rate(standing.contender) for standing in tuned}
    scores = [t.validation for all_ in trials.values() for t in all_ if t.validation is not None]
    rates = [float(t.params[RATE]) for all_ in trials.values() for t in all_]
    if not scores:
        return None
    x, y = log_axis(rates, "learning rate", most=3), linear_axis(scores, metric_name(results.metric), most=4)
    charts = []
    for standing in tuned:
        if not trials[standing.name]:
            continue
        chart = _trials_chart(standing, trials[standing.name], x, y, results.greater_is_better)
        charts.append(chart)
    key = (("win", "chosen"), ("open", "another trial"), ("failed", "failed, at the worst end of the axis"))
    caption = "Validation score against learning rate. All charts have the same axes; other options differ as well."
    return Figure(caption, tuple(charts), space_table(tuned), key)


def _with_rate(contender: Contender) -> list[Training]:
    return [trial for trial in contender.trials if float(trial.params.get(RATE) or 0.0) > 0]


def _trials_chart(standing: Standing, trials: Sequence[Training], x: Axis, y: Axis, greater_is_better: bool) -> Plot:
    contender = standing.contender
    chosen = None if contender.chosen is None else contender.trials[contender.chosen]
    points: dict[str, list[tuple[float, float]]] = {"failed": [], "open": [], "win": []}
    for trial in trials:
        worst = y.low if greater_is_better else y.high
        there = trial.validation is not None and math.isfinite(trial.validation)
        kind = "failed" if not there else "win" if trial is chosen else "open"
        points[kind].append((float(trial.params[RATE]), trial.validation if there and trial.validation else worst))
    series = tuple(Series(kind, tuple(places)) for kind, places in points.items() if places)
    said = f"{len(trials)} trials"
    if chosen is not None:
        said += f"; chosen: learning rate {plain(chosen.params.get(RATE))}, score {score(chosen.validation)}"
    return Plot(standing.name, said, series, x, y, small=True)


def space_table(tuned: Sequence[Standing]) -> Table:
    """What was tuned, and within which ranges."""
    rows = tuple((standing.name, name, text) for standing in tuned for name, text in standing.contender.space.items())
    return Table("What was tuned", ("strategy", "option", "range or values"), rows, folded=True)


def trials_table(tuned: Sequence[Standing]) -> Table:
    """Every trial."""
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for standing in tuned:
        for number, trial in enumerate(standing.contender.trials):
            chosen = number == standing.contender.chosen
            if chosen:
                strong.add(len(rows))
            note = "chosen" if chosen else trial.error or NONE
            cells = score(trial.validation), f"{trial.best_epoch:g}", seconds(trial.seconds), note
            rows.append((standing.name, str(number + 1), options(trial.params), *cells))
    headers = ("strategy", "trial", "options", "validation", "best epoch", "seconds", "note")
    return Table("All trials", headers, tuple(rows), frozenset(strong), folded=True)


# --- feature distortion ----------------------------------------------------------------------------------


def distortion(results: Results, found: Sequence[Standing]) -> Section | None:
    """How far the features moved, block by block; None where it was not measured."""
    measured = {standing.name: mean_distortion(standing.contender.finished_runs) for standing in found}
    measured = {name: splits for name, splits in measured.items() if splits}
    if not measured:
        return None
    values = [
        far["relative_l2"] for splits in measured.values() for blocks in splits.values() for far in blocks.values()
    ]
    longest = max((blocks for splits in measured.values() for blocks in splits.values()), key=len)
    last = len(longest) - 1
    ticks = tuple((float(i), text) for i, text in ((0, "first"), (last, "head")) if last or not i)
    x = Axis(-0.2, max(last, 1) + 0.2, ticks, "block")
    y = linear_axis(values, "relative L2 distance", most=4, include=[0.0])
    splits = list(dict.fromkeys(split for of_one in measured.values() for split in of_one))
    kinds = dict(zip(splits, ("other", "second", "front", "open"), strict=False))
    charts = tuple(_distortion_chart(name, of_one, kinds, x, y) for name, of_one in measured.items())
    key = tuple((kind, _in_words(split)) for split, kind in kinds.items())
    lead = (
        "The distance between each block's features before and after training, relative to those before, as a mean "
        "over samples and seeds: 0 is unmoved. Strategies that keep the pretrained features often do better on other "
        "data."
    )
    caption = "Relative L2 distance, from the first block to what goes into the head. All charts have the same axes."
    figure = Figure(caption, charts, distortion_table(measured), key)
    return Section("distortion", "How far the features moved", (Text(lead), figure))


def _in_words(split: str) -> str:
    return {"ood": "out of distribution", "test": "in distribution (test)"}.get(split, SPLIT_NAMES.get(split, split))


def mean_distortion(runs: Sequence[Training]) -> dict[str, dict[str, dict[str, float]]]:
    """By split, block and measure, the mean over runs."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        for split, blocks in run.distortion.items():
            for block, measures in blocks.items():
                for measure, value in measures.items():
                    found.setdefault(split, {}).setdefault(block, {}).setdefault(measure, []).append(value)
    return {
        split: {block: {name: statistics.fmean(values) for name, values in m.items()} for block, m in blocks.items()}
        for split, blocks in found.items()
    }


def _distortion_chart(
    name: str, splits: Mapping[str, Mapping[str, Mapping[str, float]]], kinds: Mapping[str, str], x: Axis, y: Axis
) -> Plot:
    series, said = [], []
    for split, blocks in splits.items():
        far = [measures["relative_l2"] for measures in blocks.values()]
        series.append(Series(kinds.get(split, "open"), tuple(enumerate(far)), joined=True))
        said.append(f"{_in_words(split)}: {score(far[0])} at the first block, {score(far[-1])} at the head")
    return Plot(name, "; ".join(said), tuple(series), x, y, small=True)


def distortion_table(measured: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> Table:
    """Both measures by strategy and split; the blocks are columns where they are few."""
    caption = "Feature distortion by block: relative L2 distance and cosine similarity"
    flat = [(name, split, blocks) for name, splits in measured.items() for split, blocks in splits.items()]
    columns = list(dict.fromkeys(block for _, _, blocks in flat for block in blocks))
    if len(columns) > BLOCK_COLUMNS:
        long = tuple(
            (name, _in_words(split), block, *(score(measures.get(key)) for key in MEASURES))
            for name, split, blocks in flat
            for block, measures in blocks.items()
        )
        return Table(caption, ("strategy", "data", "block", *MEASURES.values()), long, folded=True)
    rows = tuple(
        (name, _in_words(split), measure, *(score(blocks.get(block, {}).get(key)) for block in columns))
        for name, split, blocks in flat
        for key, measure in MEASURES.items()
    )
    return Table(caption, ("strategy", "data", "measure", *columns), rows, folded=True)
