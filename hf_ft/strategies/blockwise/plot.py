"""Plot of a block search: score against depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ft.documents.figure import new_figure
from hf_ft.strategies.blockwise.scores import BlockScore, BlockScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SCORE, _BEST, _PRUNED = "#34495e", "#c0392b", "#a0a0a0"
_BASELINES = {"head": ("head only", "#2980b9", "--"), "all": ("all layers", "#d68910", "-.")}
_NAMED = 12  # with more candidates their names would overlap


def plot_scores(scores: BlockScores, file: str | Path) -> None:
    """Plot the mean score of each candidate against its position in the network, and save the figure.

    Horizontal bars span a candidate's layers, vertical bars are ± one standard deviation over the seeds, hollow grey
    markers are pruned candidates, and lines and bands are the baselines. Shading marks the quarters of the depth,
    which refer to a candidate's centre. With ``top_layers`` the layers are scattered, so the axis is the number of
    trained layers.

    Args:
        scores: results of the search.
        file: output file; the suffix determines the format (png, svg, pdf).

    Raises:
        ImportError: if matplotlib is not installed; it comes with the extra ``report``.
    """
    figure = new_figure("plot_scores", 8, 4)
    axes = figure.subplots()
    scattered = scores.scheme == "top_layers"
    finite = [score for score in scores.scores if math.isfinite(score.mean)]
    if not scattered:
        _draw_quarters(axes, scores.layers)
    _draw_baselines(axes, scores)
    best = scores.best if any(score.ranks for score in finite) else None
    for score in finite:
        _draw(axes, score, scattered, score is best)
    _name(axes, finite, best, scattered)
    _draw_labels(axes, scores, scattered)
    figure.legend(*_legend(axes), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def _draw_quarters(axes: Axes, layers: int) -> None:
    # Centres are multiples of 1/2: draw the border between the last of one quarter and the first of the next.
    borders = [-0.5, *(math.ceil(quarter * layers / 2) / 2 - 0.25 for quarter in (1, 2, 3)), layers - 0.5]
    for quarter, (left, right) in enumerate(zip(borders, borders[1:], strict=False), start=1):
        if right <= left:  # fewer than four layers: some quarters are empty
            continue
        axes.axvspan(left, right, color="#2c3e50", alpha=0.09 if quarter % 2 else 0.03, linewidth=0)
        place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "color": "#7f8c8d"}
        axes.text((left + right) / 2, 0.98, f"Q{quarter}", fontsize=9, **place)  # type: ignore[arg-type]
    edge = 0.015 * layers  # keeps markers on the first and last layer from being clipped
    axes.set_xlim(borders[0] - edge, borders[-1] + edge)


def _draw_baselines(axes: Axes, scores: BlockScores) -> None:
    for name, score in scores.baselines.items():
        label, color, style = _BASELINES.get(name, (name, "#16a085", ":"))
        if not math.isfinite(score.mean):
            continue
        axes.axhline(score.mean, color=color, linestyle=style, linewidth=1.3, label=f"{label} {score.mean:.3f}")
        if score.std:
            axes.axhspan(score.mean - score.std, score.mean + score.std, color=color, alpha=0.12, linewidth=0)


def _place(score: BlockScore, scattered: bool) -> float:
    return len(score.candidate.layers) if scattered else score.candidate.centre


def _draw(axes: Axes, score: BlockScore, scattered: bool, best: bool) -> None:
    color = _PRUNED if score.pruned else _BEST if best else _SCORE
    layers, place = score.candidate.layers, _place(score, scattered)
    look: dict[str, Any] = {"color": color, "zorder": 4 if best else 3}
    if not scattered and len(layers) > 1:
        ends = (layers[0] - 0.35, layers[-1] + 0.35)
        axes.plot(ends, (score.mean, score.mean), linewidth=2, alpha=0.45, solid_capstyle="butt", **look)
    kind = "pruned" if score.pruned else "best" if best else "candidate, mean ± std" if score.std else "candidate"
    mark = {"marker": "*" if best else "o", "markersize": 13 if best else 5}
    axes.errorbar(
        place,
        score.mean,
        yerr=None if score.pruned else score.std,
        capsize=2,
        elinewidth=1,
        linestyle="none",
        markerfacecolor="white" if score.pruned else color,
        label=kind,
        **mark,  # type: ignore[arg-type]
        **look,
    )


def _name(axes: Axes, shown: Sequence[BlockScore], best: BlockScore | None, scattered: bool) -> None:
    """Label the markers: all candidates if there are few, otherwise only the best."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]  # legible on lines and bars
    for score in shown if len(shown) <= _NAMED else filter(None, [best]):
        top = score.mean + (0 if score.pruned else score.std or 0)
        color = _BEST if score is best else _PRUNED if score.pruned else _SCORE
        name = score.candidate.name + (f" {score.mean:.3f}" if score is best else "")
        above = 9 if score is best else 5
        axes.annotate(
            name,
            (_place(score, scattered), top),
            xytext=(0, above),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=color,
            zorder=5,
            path_effects=halo,
        )


def _draw_labels(axes: Axes, scores: BlockScores, scattered: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    several = f", {len(scores.seeds)} seeds" if len(scores.seeds) > 1 else ""
    axes.set_xlabel("layers trained together, best first" if scattered else "layer, from input to output")
    axes.set_ylabel(scores.metric.replace("_", " "))
    axes.set_title(f"scheme {scores.scheme}: {len(scores.scores)} candidates{several}", fontsize=10)
    axes.margins(y=0.22)  # room for names and the quarters' labels
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    """One entry per kind of marker."""
    handles, labels = axes.get_legend_handles_labels()
    kinds = dict(zip(labels, handles, strict=True))
    return list(kinds.values()), list(kinds)
