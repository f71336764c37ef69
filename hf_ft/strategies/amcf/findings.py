"""Findings of the particle swarm search, for display."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hf_ft.core.findings import Figure, Findings, Table, Text
from hf_ft.documents.chart import Axis, Plot, Series, linear_axis
from hf_ft.documents.text import metric_name, score
from hf_ft.strategies.amcf.plot import plot_scores, plot_swarm
from hf_ft.strategies.amcf.scores import Evaluation, SwarmScores

SHOWN = 12  # positions in the short table, best first; swarm.json has all of them


def swarm_findings(swarm: SwarmScores) -> Findings:
    """The best positions, charts, and ``swarm.json``, ``swarm.png`` and ``swarm_scores.png``."""
    headers, rows = swarm.table()
    about = f"frozen layers, {swarm.metric} on held-out training samples"
    plots: dict[str, Callable[[Path], None]] = {}
    if swarm.generations:
        plots["swarm.png"] = partial(plot_swarm, swarm)
    if len(swarm.layers) < 3:
        plots["swarm_scores.png"] = partial(plot_scores, swarm)
    return Findings(
        swarm.verdict(),
        blocks=(swarm_figure(swarm),) if any(math.isfinite(visit.score) for visit in swarm.evaluations) else (),
        short=(Table(about, headers, tuple(rows[:SHOWN])), Text(swarm.verdict())),
        files={"swarm.json": swarm.to_dict()},
        plots=plots,
    )


def swarm_figure(swarm: SwarmScores) -> Figure:
    """Score against frozen layers, one chart per model."""
    best = max(
        (evaluation for evaluation in swarm.evaluations if evaluation.ranks), key=lambda f: f.score, default=None
    )
    finite = [evaluation for evaluation in swarm.evaluations if math.isfinite(evaluation.score)]
    y = linear_axis([evaluation.score for evaluation in finite], metric_name(swarm.metric), most=4)
    charts = tuple(
        _swarm_chart(
            name, layers, [(evaluation.position[member], evaluation) for evaluation in swarm.evaluations], best, y
        )
        for member, (name, layers) in enumerate(zip(swarm.members, swarm.layers, strict=True))
    )
    headers, rows = swarm.table()
    table = Table("Trained positions, best first", headers, tuple(rows), folded=True)
    key = (
        ("win", "the best, which is used"),
        ("open", "trained to the end"),
        ("pruned", "pruned or diverged"),
    )
    caption = f"Score ({metric_name(swarm.metric)} on held-out training samples) against the number of frozen layers."
    return Figure(caption, charts, table, key)


def _swarm_chart(
    name: str, layers: int, visits: Sequence[tuple[int, Evaluation]], best: Evaluation | None, y: Axis
) -> Plot:
    points: dict[str, list[tuple[float, float]]] = {"pruned": [], "open": [], "win": []}
    for frozen, evaluation in visits:
        kind = "win" if evaluation is best else "open" if evaluation.ranks else "pruned"
        points[kind].append((frozen, evaluation.score if math.isfinite(evaluation.score) else y.low))
    series = tuple(Series(kind, tuple(places)) for kind, places in points.items() if places)
    about = f"{len(visits)} positions"
    if best is not None:
        at = next(frozen for frozen, evaluation in visits if evaluation is best)
        about += f"; the best freezes {at} of {layers} layers and scores {score(best.score)}"
    return Plot(name, about, series, linear_axis([0.0, layers - 1.0], "frozen layers", most=4), y, small=True)
