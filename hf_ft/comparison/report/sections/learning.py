"""The second part of the report: learning curves and tuning trials."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from hf_ft.comparison.report.sections.ranking import kind_of
from hf_ft.comparison.results import Contender, Results, Training
from hf_ft.comparison.statistics import Standing, winner
from hf_ft.core.config import BASELINE
from hf_ft.documents.chart import Axis, Plot, Series, linear_axis, log_axis
from hf_ft.documents.document import Block, Figure, Section, Table, Text
from hf_ft.documents.text import NONE, metric_name, names, plain, score, seconds

RATE = "learning_rate"
CURVE_COLUMNS = 16  # maximum number of epochs shown in the table


def process_sections(results: Results, standings: Sequence[Standing]) -> list[Section]:
    """All non-empty sections of this part."""
    sections = (learning_curves(results, standings), tuning(results, standings))
    return [section for section in sections if section is not None]


# --- learning curves -------------------------------------------------------------------------------------


def mean_curve(runs: Sequence[Training]) -> dict[float, float]:
    """Mean validation score by epoch, over the runs evaluated at that epoch."""
    scores: dict[float, list[float]] = {}
    for run in runs:
        for point in run.curve:
            value = point.get("validation")
            if value is not None and math.isfinite(value):
                scores.setdefault(round(point["epoch"], 2), []).append(value)
    return {epoch: statistics.fmean(scores[epoch]) for epoch in sorted(scores)}


def learning_curves(results: Results, standings: Sequence[Standing]) -> Section | None:
    """A small chart for each contender, with the curve of full fine-tuning in the background."""
    curves = {standing.name: mean_curve(standing.contender.finished_runs) for standing in standings}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    best, metric = winner(results, standings), metric_name(results.metric)
    x = linear_axis([epoch for curve in curves.values() for epoch in curve], "epoch", most=4, include=[0.0])
    y = linear_axis([value for curve in curves.values() for value in curve.values()], metric, most=4)
    behind = (Series("base", tuple(curves.get(BASELINE, {}).items()), joined=True, marked=False),)
    charts = []
    for standing in standings:
        curve = curves.get(standing.name)
        if not curve:
            continue
        kind, pick = kind_of(standing, best), max if results.greater_is_better else min
        top = pick(curve.items(), key=lambda point: point[1])
        own = (Series(kind, tuple(curve.items()), joined=True, marked=False), Series(kind, (top,)))
        series = own if standing.name == BASELINE else (*behind, *own)
        about = f"from {score(next(iter(curve.values())))} to {score(top[1])} at epoch {top[0]:g}"
        charts.append(Plot(standing.name, about, series, x, y, small=True, strong=kind == "win"))
    caption = (
        f"Validation {metric} after each epoch, averaged over seeds, with a marker at the best epoch. The dashed line "
        "is full fine-tuning. All charts have the same axes."
    )
    key = (("win", "the winner"), ("other", "others"), ("base", "full fine-tuning"))
    figure = Figure(caption, tuple(charts), curve_table(curves), key)
    lead = "The best epoch of each run counts. A curve that is still improving at the end calls for more epochs."
    return Section("curves", "Learning curves", (Text(lead), figure))


def curve_table(curves: Mapping[str, Mapping[float, float]]) -> Table:
    """Mean scores by contender and epoch."""
    epochs = sorted({epoch for curve in curves.values() for epoch in curve})
    if len(epochs) > CURVE_COLUMNS:
        step = (len(epochs) - 1) / (CURVE_COLUMNS - 1)
        epochs = sorted({epochs[round(i * step)] for i in range(CURVE_COLUMNS)})
    rows = tuple((name, *(score(curve.get(epoch)) for epoch in epochs)) for name, curve in curves.items())
    return Table("Mean validation score by epoch", ("strategy", *(f"{e:g}" for e in epochs)), rows, folded=True)


# --- tuning ----------------------------------------------------------------------------------------------


def tuning(results: Results, standings: Sequence[Standing]) -> Section | None:
    """Trials, choices, and ranges that were too narrow."""
    tuned = [standing for standing in standings if standing.contender.trials]
    if not tuned:
        return None
    lead = (
        "Each strategy had the same budget for its trials, including its measurements on the data. The "
        "final runs use the options of the trial with the best validation score, or the defaults where these score "
        "higher when both are trained again."
    )
    edges = [standing.name for standing in tuned if standing.contender.on_edge]
    warning = (
        f"A chosen value lies on the edge of its range for {names(edges)}: a better one may lie beyond, so the scores "
        "shown may not be the best these strategies can achieve."
    )
    figure = trials_figure(results, tuned, winner(results, standings))
    blocks: list[Block] = [Text(lead), *([Text(warning)] if edges else []), tuning_table(tuned)]
    blocks += [figure] if figure else []
    return Section("tuning", "Tuning", (*blocks, trials_table(tuned)))


def tuning_table(tuned: Sequence[Standing]) -> Table:
    """The budget and chosen settings of each contender."""
    rows: list[tuple[str, ...]] = []
    for standing in tuned:
        contender, failed = standing.contender, standing.failed_trials
        chosen = None if contender.chosen is None else contender.trials[contender.chosen]
        remarks = [f"{name} is on the edge of {contender.space.get(name, 'its range')}" for name in contender.on_edge]
        again = [run.validation for run in contender.rejected if run.validation is not None]
        if contender.chosen == 0 and again:
            remarks.insert(
                0, f"trained again, the best trial scored {score(statistics.fmean(again))} only: these are the defaults"
            )
        rows.append(
            (
                standing.name,
                f"{len(contender.trials)}" + (f" ({failed} failed)" if failed else ""),
                budget(contender),
                NONE if chosen is None else score(chosen.validation),
                NONE if chosen is None else options(chosen.params),
                "; ".join(remarks) or NONE,
            )
        )
    headers = ("strategy", "trials", "of budget", "validation", "chosen", "remarks")
    return Table("Budget and chosen options", headers, tuple(rows))


def budget(contender: Contender) -> str:
    """How much of the budget was used: as work, or in seconds if the budget was in seconds."""
    if contender.allowed_seconds:
        return f"{seconds(contender.tuning_seconds)} s of {seconds(contender.allowed_seconds)} s"
    return f"{contender.used:.0%}, in {seconds(contender.tuning_seconds)} s"


def options(params: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {plain(value)}" for name, value in params.items()) or "nothing to tune"


def trials_figure(results: Results, tuned: Sequence[Standing], best: Standing | None) -> Figure | None:
    """Validation score against learning rate, in a small chart for each contender."""
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
    key = (("win", "chosen"), ("open", "other trials"), ("failed", "failed, drawn at the worst end of the axis"))
    caption = "Validation score against learning rate. All charts have the same axes; other options vary as well."
    return Figure(caption, tuple(charts), space_table(tuned), key)


def _with_rate(contender: Contender) -> list[Training]:
    return [trial for trial in contender.trials if _rate(trial) > 0]


def _rate(trial: Training) -> float:
    """The learning rate; 0 if there is none."""
    rate = trial.params.get(RATE)
    return float(rate) if isinstance(rate, int | float) else 0.0


def _trials_chart(standing: Standing, trials: Sequence[Training], x: Axis, y: Axis, greater_is_better: bool) -> Plot:
    contender = standing.contender
    chosen = None if contender.chosen is None else contender.trials[contender.chosen]
    points: dict[str, list[tuple[float, float]]] = {"failed": [], "open": [], "win": []}
    for trial in trials:
        worst = y.low if greater_is_better else y.high
        value = math.nan if trial.validation is None else trial.validation
        kind = "failed" if not math.isfinite(value) else "win" if trial is chosen else "open"
        points[kind].append((float(trial.params[RATE]), worst if kind == "failed" else value))
    series = tuple(Series(kind, tuple(places)) for kind, places in points.items() if places)
    about = f"{len(trials)} trials"
    if chosen is not None:
        about += f"; chosen: learning rate {plain(chosen.params.get(RATE))}, score {score(chosen.validation)}"
    return Plot(standing.name, about, series, x, y, small=True)


def space_table(tuned: Sequence[Standing]) -> Table:
    """The search space of each contender."""
    rows = tuple((standing.name, name, text) for standing in tuned for name, text in standing.contender.space.items())
    return Table("Search space", ("strategy", "option", "range or values"), rows, folded=True)


def trials_table(tuned: Sequence[Standing]) -> Table:
    """All trials."""
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
