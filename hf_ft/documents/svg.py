"""Charts as SVG whose width follows the page while text and marks keep their size.

Horizontal positions are percentages of the drawing, vertical positions are pixels; axis labels lie in the margins. One
drawing is therefore legible on a phone, on a wide screen and on paper, and takes its colours from the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from hf_ft.documents.chart import KINDS, Axis, Chart, Plot, Row, Rows, Series
from hf_ft.documents.label_places import LETTER, placed

SHAPES = {
    "diamond": "M0-6 6 0 0 6-6 0Z",
    "diamond-open": "M0-6 6 0 0 6-6 0Z",
    "square": "M-4.5-4.5h9v9h-9Z",
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
    "ring": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
    "triangle": "M0-5.5 5.5 4.5h-11Z",
    "cross": "M-4-4 4 4M4-4-4 4",
}
ROW = 24  # height of a row, in pixels
FEW, CROWD = 20, 8  # a plot with more labelled points than FEW is CROWD pixels higher for each further one
LONGEST = 20  # letters in a line of a label


def svg(chart: Chart, name: str) -> str:
    """Draw a chart as SVG.

    Args:
        chart: the chart to draw.
        name: prefix of its element ids; must be unique on a page.
    """
    return _draw_rows(chart, name) if isinstance(chart, Rows) else _draw_plot(chart, name)


def mark(kind: str, x: str = "0", y: float = 0.0, inside: str = "") -> str:
    """The mark of a kind; ``inside`` is drawn with it."""
    path = f'<path class="k-{kind} s-{KINDS[kind]}" d="{SHAPES[KINDS[kind]]}"/>'
    return f'<svg x="{x}" y="{y:g}" overflow="visible">{path}{inside}</svg>'


def key_mark(kind: str, bar: bool = False) -> str:
    """A mark or a short bar on its own, for a legend with its meaning next to it."""
    shape = f'<rect y="2" width="16" height="12" class="bar k-{kind}"/>' if bar else mark(kind, "8", 8)
    return f'<svg class="key" width="16" height="16" aria-hidden="true">{shape}</svg>'


@dataclass
class _Canvas:
    """Collects the elements of a drawing."""

    chart: Chart
    name: str
    height: float
    parts: list[str] = field(default_factory=list)

    def text(self, x: str, y: float, words: str, role: str = "", shift: float = 0.0, anchor: str = "start") -> None:
        offset = f' dx="{shift:g}"' if shift else ""
        self.parts.append(
            f'<text x="{x}" y="{y:g}"{offset} class="{role or "t"}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def line(self, x1: str, y1: float, x2: str, y2: float, role: str) -> None:
        self.parts.append(f'<line x1="{x1}" y1="{y1:g}" x2="{x2}" y2="{y2:g}" class="{role}"/>')

    def done(self, left: float, right: float, extra: str = "") -> str:
        title, description = escape(self.chart.title), escape(self.chart.description)
        return (
            f'<div class="chart{extra}" style="padding-left:{left:g}px;padding-right:{right:g}px">'
            f'<svg role="img" aria-labelledby="{self.name}-t {self.name}-d" width="100%" height="{self.height:g}" '
            f'overflow="visible"><title id="{self.name}-t">{title}</title><desc id="{self.name}-d">{description}</desc>'
            f"{''.join(self.parts)}</svg></div>"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def _lines_of(label: str) -> list[str]:
    """Split a long label into lines after a ``+``, a space or an underscore, or anywhere if there is none."""
    lines = [""]
    for part in label.replace("+", "+\0").replace(" ", " \0").replace("_", "_\0").split("\0"):
        while len(part) > LONGEST:
            lines += [part[:LONGEST]]
            part = part[LONGEST:]
        if lines[-1] and len(lines[-1] + part) > LONGEST:
            lines.append("")
        lines[-1] += part
    return [line.strip() for line in lines if line.strip()] or [""]


def _draw_rows(chart: Rows, name: str) -> str:
    labels = [_lines_of(row.label) for row in chart.rows]
    heights = [ROW + 13 * (len(lines) - 1) for lines in labels]
    top = 8 + 13 * len(chart.lines)
    bottom = top + sum(heights)
    canvas = _Canvas(chart, name, bottom + 38)
    _draw_x_axis(canvas, chart.axis, top, bottom)
    _draw_reference_lines(canvas, chart, top, bottom)
    y = float(top)
    for row, lines, height in zip(chart.rows, labels, heights, strict=True):
        middle = y + height / 2
        for i, line in enumerate(lines):
            role = "t strong" if row.kind in ("win", "base") else "t"
            canvas.text("0", middle + 4 + 13 * (i - (len(lines) - 1) / 2), line, role, shift=-10, anchor="end")
        _draw_row(canvas, chart, row, middle)
        y += height
    left = 14 + LETTER * max((len(line) for lines in labels for line in lines), default=0)
    right = 12 + LETTER * max((len(row.text) for row in chart.rows), default=0)
    return canvas.done(left, right)


def _draw_reference_lines(canvas: _Canvas, chart: Rows, top: float, bottom: float) -> None:
    for i, (value, label) in enumerate(chart.lines):  # labels one below the other
        share = chart.axis.share(value)
        canvas.line(_percent(share), 15 + 13 * i, _percent(share), bottom, "reference")
        anchor = "start" if share < 0.2 else "end" if share > 0.8 else "middle"
        canvas.text(_percent(share), 11 + 13 * i, label, "t halo", anchor=anchor)


def _draw_row(canvas: _Canvas, chart: Rows, row: Row, y: float) -> None:
    if row.value is None or not math.isfinite(row.value):
        canvas.text("0", y + 4, row.text or "none", "t", shift=4)
        return
    at = _percent(chart.axis.share(row.value))
    if chart.bars:
        canvas.parts.append(f'<rect x="0" y="{y - 7:g}" width="{at}" height="14" class="bar k-{row.kind}"/>')
    if row.interval is not None:
        low, high = (_percent(chart.axis.share(end)) for end in row.interval)
        role = f"interval k-{'base' if chart.bars else row.kind}"  # invisible on a bar of the same colour
        canvas.line(low, y, high, y, role)
        for end in (low, high):
            canvas.line(end, y - 4, end, y + 4, role)
    if not chart.bars:
        canvas.parts.append(mark(row.kind, at, y))
    canvas.text("100%", y + 4, row.text, "t", shift=8)


def _draw_x_axis(canvas: _Canvas, axis: Axis, top: float, bottom: float, label: bool = True) -> None:
    crowded = isinstance(canvas.chart, Rows) and len(axis.ticks) > 3
    for i, (value, text) in enumerate(axis.ticks):
        at = _percent(axis.share(value))
        canvas.line(at, top, at, bottom, "grid")
        canvas.text(at, bottom + 15, text, "t wide" if crowded and i % 2 else "t", anchor="middle")
    canvas.line("0", bottom, "100%", bottom, "axis")
    if label and axis.label:
        canvas.text("50%", bottom + 32, axis.label, "t", anchor="middle")


def _draw_plot(chart: Plot, name: str) -> str:
    labelled = sum(len(series.points) for series in chart.series if series.labels)
    top, bottom = (6.0, 106.0) if chart.small else (22.0, 322.0 + CROWD * max(0, labelled - FEW))
    canvas = _Canvas(chart, name, bottom + (20 if chart.small else 38))
    _draw_x_axis(canvas, chart.x, top, bottom, label=not chart.small)
    for value, text in chart.y.ticks:
        y = _down(chart.y, value, top, bottom)
        canvas.line("0", y, "100%", y, "grid")
        canvas.text("0", y + 4, text, "t", shift=-6, anchor="end")
    if not chart.small:
        canvas.text("0", 10, chart.y.label, "t", shift=-38)
    places = [_places(chart, series, top, bottom) for series in chart.series]
    for series, points in zip(chart.series, places, strict=True):
        if series.joined and len(points) > 1:
            _draw_line(canvas, series.kind, points)
    _draw_labels(canvas, chart.series, places)
    for series, points in zip(chart.series, places, strict=True):
        for x, y in points if series.marked else ():
            canvas.parts.append(mark(series.kind, _percent(x), y))
    left = 10 + LETTER * max((len(text) for _, text in chart.y.ticks), default=0)
    drawing = canvas.done(max(left, 38) if not chart.small else left, 14)
    if not chart.small:
        return drawing
    role = ' class="strong"' if chart.strong else ""
    return f'<div class="panel"><p aria-hidden="true"{role}>{escape(chart.title)}</p>{drawing}</div>'


def _down(axis: Axis, value: float, top: float, bottom: float) -> float:
    return round(bottom - axis.share(value) * (bottom - top), 1)


def _places(chart: Plot, series: Series, top: float, bottom: float) -> list[tuple[float, float]]:
    """Positions of the finite points: horizontal as a share, vertical in pixels."""
    finite = [(x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y)]
    return [(chart.x.share(x), _down(chart.y, y, top, bottom)) for x, y in finite]


def _draw_line(canvas: _Canvas, kind: str, places: Sequence[tuple[float, float]]) -> None:
    through = " ".join(f"{100 * x:.2f},{y:g}" for x, y in places)
    canvas.parts.append(
        f'<svg width="100%" height="{canvas.height:g}" viewBox="0 0 100 {canvas.height:g}" '
        f'preserveAspectRatio="none" overflow="visible"><polyline class="curve k-{kind}" '
        f'vector-effect="non-scaling-stroke" points="{through}"/></svg>'
    )


def _draw_labels(canvas: _Canvas, series: Sequence[Series], places: Sequence[list[tuple[float, float]]]) -> None:
    """Label the points where little is covered; text after a space is shown on wide pages only."""
    pairs = [(own, points) for own, points in zip(series, places, strict=True) if own.labels]
    line = [point for own, points in zip(series, places, strict=True) if own.joined for point in points]
    points = [point for _, own in pairs for point in own]
    labels = [label for own, _ in pairs for label in own.labels]
    for (x, y), (place, label) in zip(points, placed(points, labels, line), strict=True):
        short, _, rest = label.partition(" ")
        more = f'<tspan class="wide"> {escape(rest)}</tspan>' if rest else ""
        canvas.parts.append(
            f'<text x="{_percent(x)}" y="{y:g}" dx="{place.dx}" dy="{place.dy}" class="t halo" '
            f'text-anchor="{place.anchor}">{escape(short)}{more}</text>'
        )
