"""Findings of a block search, for display."""

from __future__ import annotations

import math
from functools import partial

from hf_ft.core.findings import Figure, Findings, Table
from hf_ft.documents.chart import Row, Rows, linear_axis
from hf_ft.documents.text import metric_name
from hf_ft.strategies.blockwise.plot import plot_scores
from hf_ft.strategies.blockwise.scores import BlockScore, BlockScores

BASELINES = {"head": "head only", "all": "all layers"}


def block_findings(scores: BlockScores, summary: str = "") -> Findings:
    """The table and verdict of a search, a chart, and the files ``blocks.json``, ``blocks.md`` and ``blocks.png``."""
    headers, rows = scores.table()
    about = f"blocks by {scores.scheme}, {scores.metric} on held-out training samples"
    return Findings(
        summary,
        blocks=(block_figure(scores),) if scores.scores else (),
        short=(Table(about, headers, tuple(rows)), Table("", (), tuple(scores.verdict()))),
        files={"blocks.json": scores.to_dict(), "blocks.md": f"{scores.markdown()}\n"},
        plots={"blocks.png": partial(plot_scores, scores)},
    )


def block_figure(scores: BlockScores) -> Figure:
    """A bar chart with one bar per candidate, from input to output."""
    best = max((score for score in scores.scores if score.ranks), key=lambda s: s.mean, default=None)
    ordered = sorted(scores.scores, key=lambda s: s.candidate.centre)
    rows = tuple(_block_row(entry, entry is best) for entry in ordered)
    lines = tuple((s.mean, BASELINES.get(n, n)) for n, s in scores.baselines.items() if math.isfinite(s.mean))
    values = [row.value for row in rows if row.value is not None] + [value for value, _ in lines]
    axis = linear_axis(values or [0.0], metric_name(scores.metric), include=[0.0])
    about = "; ".join(f"{row.label} {row.text}" for row in rows)
    chart = Rows("Score by block, from input to output", about, rows, axis, lines, bars=True)
    headers, cells = scores.table()
    table = Table("Scores of the block search", headers, tuple(cells), folded=True)
    key = [("win", "the best, which is used"), ("other", "candidates")]
    if any(entry.pruned for entry in scores.scores):
        key.append(("pruned", "pruned, so its score is not that of a complete run"))
    caption = (
        f"Each candidate was trained together with only the head: {metric_name(scores.metric)} on held-out training "
        "samples."
    )
    return Figure(caption, (chart,), table, tuple(key))


def _block_row(entry: BlockScore, best: bool) -> Row:
    if not math.isfinite(entry.mean):
        return Row(entry.candidate.name, None, "diverged")
    ends = (entry.mean - entry.std, entry.mean + entry.std) if entry.std else None
    kind = "win" if best else "pruned" if entry.pruned else "other"
    note = {"win": " best", "pruned": " pruned"}.get(kind, "")
    return Row(entry.candidate.name, entry.mean, entry.shown() + note, ends, kind)
