"""Charts as data: points, lines and bars over axes. :mod:`hf_ft.documents.svg` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

# Kinds of marks. The page defines the colour (class ``k-...``); the shape distinguishes a kind without colour.
KINDS = {
    "win": "diamond",
    "base": "square",
    "other": "circle",
    "open": "ring",
    "front": "diamond-open",
    "failed": "cross",
    "pruned": "cross",
    "second": "triangle",
}


@dataclass(frozen=True)
class Axis:
    """The range of an axis, and its labels.

    Attributes:
        low: lower end.
        high: upper end.
        ticks: values and their labels.
        label: the quantity shown, with its unit.
        log: whether the axis is logarithmic.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str
    log: bool = False

    def share(self, value: float) -> float:
        """Relative position of a value, 0 to 1; values outside the range are clipped."""
        at = min(self.high, max(self.low, value))
        if self.log:
            return math.log(at / self.low) / math.log(self.high / self.low)
        return (at - self.low) / (self.high - self.low)


def linear_axis(values: Sequence[float], label: str, most: int = 5, include: Sequence[float] = ()) -> Axis:
    """An axis with round ticks that extends a little beyond the values; non-finite values are ignored."""
    finite = [value for value in (*values, *include) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-9:
        low, high = low - 0.05 * (abs(low) or 1.0), high + 0.05 * (abs(high) or 1.0)
    room = 0.06 * (high - low)
    start = 0.0 if low == 0.0 in include else low - room  # where 0 is the smallest possible value
    step = _round_step((high + room - start) / most)
    first, last = math.ceil(start / step - 1e-9), math.floor((high + room) / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    form = f".{decimals}f" if decimals <= 4 and last * step < 1e5 else ".2g"
    ticks = tuple((n * step, f"{n * step:{form}}".replace("-", "\u2212")) for n in range(first, last + 1))
    return Axis(start, high + room, ticks, label)


def _round_step(least: float) -> float:
    """The smallest step of 1, 2 or 5 times a power of ten that is at least this large."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def log_axis(values: Sequence[float], label: str, most: int = 5) -> Axis:
    """A logarithmic axis with ticks at powers of ten; for a small range, also at 2 and 5 times those."""
    low, high = max(min(values), 1e-100), min(max(values), 1e100)  # their ratio is finite
    if high / low < 1.5:
        low, high = low / 1.3, high * 1.3
    room = (high / low) ** 0.06
    low, high = low / room, high * room
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[tuple[float, str]] = []
    plain = low > 0.001 and high < 1e5
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [(f * 10.0**p, _power(f, p, plain)) for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(ticks) <= most:
            break
    return Axis(low, high, tuple(ticks[:: math.ceil(len(ticks) / most)] if ticks else ()), label, log=True)


def _power(factor: int, power: int, plain: bool) -> str:
    if plain:
        return f"{factor * 10.0**power:g}"
    exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{exponent}" if factor == 1 else f"{factor}·10{exponent}"


@dataclass(frozen=True)
class Row:
    """One line of a :class:`Rows` chart: a mark or a bar from 0, with its interval and its value as text."""

    label: str
    value: float | None
    text: str = ""
    interval: tuple[float, float] | None = None
    kind: str = "other"


@dataclass(frozen=True)
class Rows:
    """Named rows, each with a bar or with a mark and its interval.

    Attributes:
        title: title of the chart.
        description: text alternative for readers who cannot see the chart.
        rows: rows from top to bottom.
        axis: axis of the values.
        lines: labelled values, drawn as lines across all rows.
        bars: draw bars from 0 instead of marks.
    """

    title: str
    description: str
    rows: tuple[Row, ...]
    axis: Axis
    lines: tuple[tuple[float, str], ...] = ()
    bars: bool = False
    small: ClassVar[bool] = False


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        kind: one of :data:`KINDS`.
        points: x and y.
        joined: whether a line connects the points.
        marked: whether each point has a mark.
        labels: empty, or one per point (all points are then finite); on narrow pages the text after a space is omitted.
    """

    kind: str
    points: tuple[tuple[float, float], ...]
    joined: bool = False
    marked: bool = True
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plot:
    """Points and lines over two axes.

    Attributes:
        title: title of the chart; small charts show it above the drawing.
        description: text alternative for readers who cannot see the chart.
        series: later series are drawn over earlier ones.
        x: horizontal axis.
        y: vertical axis.
        small: whether it is one of several charts side by side.
        strong: whether to emphasise the title.
        bars: always False; see :class:`Rows`.
    """

    title: str
    description: str
    series: tuple[Series, ...]
    x: Axis
    y: Axis
    small: bool = False
    strong: bool = False
    bars: ClassVar[bool] = False


Chart = Rows | Plot
