"""Plots of a swarm search: the particles' positions over time, and the score of each position."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_ft.documents.figure import new_figure
from hf_ft.errors import OptionError
from hf_ft.strategies.amcf.scores import SwarmScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

_BEST, _DIVERGED, _LINE, _EDGE = "#c0392b", "#7f8c8d", "#34495e", "#2c3e50"
_COLORS = "viridis"  # lightness increases with the score: readable in greyscale and for colour-blind readers
_SPREAD = 0.5  # share of a generation's width; particles at the same position are drawn side by side


@dataclass(frozen=True)
class _Visit:
    """One marker: its position, its score, and whether the score is from a complete run."""

    x: float
    y: float
    score: float
    pruned: bool


def plot_swarm(scores: SwarmScores, path: str | Path) -> None:
    """Plot each particle's frozen layers over the generations, one panel per model, and save the figure.

    The line is the best position so far among complete runs.

    Args:
        scores: results of the search.
        path: output file; the suffix determines the format (png, svg, pdf).

    Raises:
        OptionError: if no generation was finished.
        ImportError: if matplotlib is not installed; it comes with the extra ``report``.
    """
    if not scores.generations:
        raise OptionError("scores has no finished generation, so there is nothing to plot: run the search for longer.")
    count = len(scores.members)
    figure = new_figure("plot_swarm", 1 + 4 * count, 4)
    panels = figure.subplots(1, count, squeeze=False)[0]
    norm = _norm(value for generation in scores.generations for value in generation.scores)
    leaders = _leaders(scores)
    for member, axes in enumerate(panels):
        line = [math.nan if leader is None else leader[member] for leader in leaders]
        if any(leaders):
            axes.plot(range(len(line)), line, color=_LINE, linewidth=1.5, zorder=2, label="best so far")
        _draw_marks(axes, _visits(scores, member), norm)
        axes.set_title(scores.members[member], fontsize=10)
        axes.set_xlabel("generation")
        axes.set_ylabel("frozen layers")
        _draw_range(axes, y=scores.layers[member])
        _draw_frame(axes)
    _draw_colorbar(figure, panels, norm, scores.metric)
    _draw_legend(figure, panels)
    figure.savefig(path, dpi=150)


def plot_scores(scores: SwarmScores, path: str | Path) -> None:
    """Plot the score of each position for one or two models, and save the figure.

    For two models: a heat map, blank at positions no particle visited. For one model: score against frozen layers.

    Args:
        scores: results of the search.
        path: output file; the suffix determines the format (png, svg, pdf).

    Raises:
        OptionError: if there are more than two models.
        ImportError: if matplotlib is not installed; it comes with the extra ``report``.
    """
    if len(scores.members) > 2:
        raise OptionError(
            f"plot_scores supports one or two models, not the {len(scores.members)} of members={scores.members!r}: use "
            "plot_swarm, or the table."
        )
    two = len(scores.members) == 2
    figure = new_figure("plot_scores", *((7, 6) if two else (7, 4)))
    axes = figure.subplots()
    (_draw_heat if two else _draw_curve)(figure, axes, scores)
    axes.set_xlabel(f"frozen layers of {scores.members[0]}")
    _draw_legend(figure, [axes])
    figure.savefig(path, dpi=150)


def _draw_heat(figure: Figure, axes: Axes, scores: SwarmScores) -> None:
    from matplotlib.patheffects import withStroke

    columns, rows = scores.layers
    cells = np.full((rows, columns), np.nan)
    for evaluation in scores.evaluations:
        cells[evaluation.position[::-1]] = evaluation.score if math.isfinite(evaluation.score) else math.nan
    norm = _norm(evaluation.score for evaluation in scores.evaluations)
    _draw_colorbar(figure, [axes], norm, scores.metric)
    axes.imshow(np.ma.masked_invalid(cells), origin="lower", aspect="auto", cmap=_COLORS, norm=norm)
    size = min(9.0, 200 / max(rows, columns))  # keeps markers within their cells
    halo = [withStroke(linewidth=size / 2, foreground="white")]  # legible on all colours
    diverged = {evaluation.position for evaluation in scores.evaluations if not math.isfinite(evaluation.score)}
    pruned = {evaluation.position for evaluation in scores.evaluations if evaluation.pruned} - diverged
    looks: dict[str, Any] = {"markersize": size, "linestyle": "none"}
    if pruned:
        look: dict[str, Any] = {"marker": "x", "color": "black", "path_effects": halo}
        axes.plot(*zip(*pruned, strict=True), label="pruned", **look, **looks)
    if diverged:
        axes.plot(*zip(*diverged, strict=True), label="diverged", marker="s", color=_DIVERGED, **looks)
    _draw_best(axes, scores)
    axes.set_ylabel(f"frozen layers of {scores.members[1]}")
    _draw_range(axes, x=columns, y=rows)


def _draw_curve(figure: Figure, axes: Axes, scores: SwarmScores) -> None:
    visits = [
        _Visit(evaluation.position[0], evaluation.score, evaluation.score, evaluation.pruned)
        for evaluation in scores.evaluations
    ]
    norm = _norm(visit.score for visit in visits)
    _draw_colorbar(figure, [axes], norm, scores.metric)
    whole = sorted((visit.x, visit.y) for visit in visits if not visit.pruned and math.isfinite(visit.y))
    axes.plot([x for x, _ in whole], [y for _, y in whole], color=_LINE, linewidth=1, alpha=0.5, zorder=2)
    _draw_marks(axes, [visit for visit in visits if math.isfinite(visit.y)], norm)
    diverged = [visit.x for visit in visits if not math.isfinite(visit.y)]
    if diverged:  # without a score, drawn along the lower edge
        look: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.scatter(diverged, [0.0] * len(diverged), label="diverged", **_looks("diverged"), **look)
    _draw_best(axes, scores)
    axes.set_ylabel(scores.metric.replace("_", " "))
    axes.margins(y=0.15)  # room for the ring around the best
    _draw_range(axes, x=scores.layers[0])
    _draw_frame(axes)


def _draw_best(axes: Axes, scores: SwarmScores) -> None:
    """Mark the best with a ring; a filled marker would hide the colour underneath."""
    if not any(evaluation.ranks for evaluation in scores.evaluations):
        return
    best = scores.best
    place = best.position if len(best.position) == 2 else (best.position[0], best.score)
    label = f"best: {', '.join(map(str, best.position))} frozen, {best.score:.3f}"
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": _BEST, "markeredgewidth": 2, "clip_on": False}
    axes.plot(*place, marker="o", markersize=14, linestyle="none", zorder=5, label=label, **ring)


def _leaders(scores: SwarmScores) -> list[tuple[int, ...] | None]:
    """The best position among complete runs up to each generation; None before the first complete run."""
    pruned = {evaluation.position for evaluation in scores.evaluations if evaluation.pruned}
    highest, leader, leaders = -math.inf, None, []
    for generation in scores.generations:
        for position, score in zip(generation.integers(), generation.scores, strict=True):
            if score > highest and position not in pruned:
                highest, leader = score, position
        leaders.append(leader)
    return leaders


def _visits(scores: SwarmScores, member: int) -> list[_Visit]:
    pruned = {evaluation.position for evaluation in scores.evaluations if evaluation.pruned}
    visits = []
    for number, generation in enumerate(scores.generations):
        shift = _SPREAD / len(generation.scores)
        left = number - shift * (len(generation.scores) - 1) / 2
        for i, (position, score) in enumerate(zip(generation.integers(), generation.scores, strict=True)):
            visits.append(_Visit(left + i * shift, position[member], score, position in pruned))
    return visits


def _draw_marks(axes: Axes, visits: Sequence[_Visit], norm: Normalize) -> None:
    """Draw one collection per kind of marker, so that each gets a legend entry."""
    kinds: dict[str, list[_Visit]] = {}
    for visit in visits:
        kind = "diverged" if not math.isfinite(visit.score) else "pruned" if visit.pruned else "trained to the end"
        kinds.setdefault(kind, []).append(visit)
    for kind, marks in kinds.items():
        shades: dict[str, Any] = {"c": [mark.score for mark in marks], "cmap": _COLORS, "norm": norm}
        look = _looks(kind) | ({} if kind == "diverged" else shades)
        axes.scatter([mark.x for mark in marks], [mark.y for mark in marks], label=kind, **look)


def _looks(kind: str) -> dict[str, Any]:
    if kind == "diverged":
        return {"marker": "s", "facecolors": "none", "edgecolors": _DIVERGED, "s": 26, "zorder": 3}
    if kind == "pruned":
        return {"marker": "x", "linewidths": 1.5, "s": 26, "zorder": 3}
    return {"marker": "o", "edgecolors": _EDGE, "linewidths": 0.6, "s": 36, "zorder": 4}


def _norm(scores: Iterable[float]) -> Normalize:
    """Map scores to shades on one scale for all panels; non-finite scores get none."""
    from matplotlib.colors import Normalize

    finite = [score for score in scores if math.isfinite(score)]
    return Normalize(min(finite), max(finite)) if finite else Normalize()


def _draw_colorbar(figure: Figure, panels: Sequence[Axes], norm: Normalize, metric: str) -> None:
    from matplotlib.cm import ScalarMappable

    if norm.scaled():  # without a finite score the norm has no limits
        figure.colorbar(ScalarMappable(norm, _COLORS), ax=list(panels), label=metric.replace("_", " "))


def _draw_range(axes: Axes, x: int | None = None, y: int | None = None) -> None:
    """Set the axis of a model's frozen layers to the full range 0 to L - 1, visited or not."""
    if x is not None:
        axes.set_xlim(-0.5, x - 0.5)
    if y is not None:
        axes.set_ylim(-0.5, y - 0.5)
        axes.yaxis.set_major_locator(_whole())
    axes.xaxis.set_major_locator(_whole())


def _whole() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _draw_frame(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One entry per kind of marker."""
    kinds: dict[str, Any] = {}
    for axes in panels:
        kinds |= {str(label): handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(kinds.values()), list(kinds), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
