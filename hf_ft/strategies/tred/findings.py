"""Findings of the disentanglement, for display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_ft.core.findings import Block, Figure, Findings, Table
from hf_ft.documents.chart import Plot, Row, Rows, Series, linear_axis
from hf_ft.documents.text import score

# Labels of those figures in hf_ft.strategies.tred.train.Disentangled that are shares.
SHARES = {
    "p_share": "norm of P / norm of F",
    "n_share": "norm of N / norm of F",
    "f_label": "label's share of F",
    "p_label": "label's share of P",
    "n_label": "label's share of N",
    "reconstruction": "error of P + N",
}


def disentangling_findings(info: Mapping[str, Any], summary: str = "") -> Findings:
    """Charts for the report; empty if nothing was disentangled."""
    return Findings(summary, blocks=tuple(disentangling_blocks(info)) if "figures" in info else ())


def disentangling_blocks(info: Mapping[str, Any]) -> list[Block]:
    """The shares of the features F in P and N, and the loss terms over the epochs."""
    figures, history = info["figures"], info["history"]
    shares = {name: figures[key] for key, name in SHARES.items() if key in figures}
    rows = tuple(Row(name, value, score(value)) for name, value in shares.items())
    axis = linear_axis([*shares.values(), 1.0], "", include=[0.0])
    about = "; ".join(f"{row.label} {row.text}" for row in rows)
    chart = Rows("Shares of the features F in the relevant part P and the remainder N", about, rows, axis, bars=True)
    numbers = tuple((name.replace("_", " "), score(value)) for name, value in figures.items())
    table = Table("Metrics of the disentangling", ("figure", "value"), numbers, folded=True)
    caption = (
        "Shares of the features F in the relevant part P and the remainder N. The label's share is the fraction of the "
        "variance that lies between classes."
    )
    blocks: list[Block] = [Figure(caption, (chart,), table)]
    if len(history) > 1:
        blocks.append(_terms_figure(history))
    return blocks


def _terms_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    charts = []
    x = linear_axis([1.0, float(len(history))], "epoch", most=4)
    for name in history[0]:
        values = [float(epoch[name]) for epoch in history]
        series = Series("other", tuple((i + 1.0, value) for i, value in enumerate(values)), joined=True, marked=False)
        about = f"from {score(values[0])} to {score(values[-1])} in {len(values)} epochs"
        charts.append(Plot(name.replace("_", " "), about, (series,), x, linear_axis(values, name, most=4), small=True))
    rows = tuple((str(i + 1), *(score(value) for value in epoch.values())) for i, epoch in enumerate(history))
    table = Table("Loss terms by epoch", ("epoch", *history[0]), rows, folded=True)
    return Figure(
        "Loss terms of the disentangling by epoch, unweighted; each chart has its own scale.", tuple(charts), table
    )
