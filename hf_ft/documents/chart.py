"""What a chart shows: points, lines and bars over axes. :mod:`hf_ft.documents.svg` draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

# A kind of mark: its colour is the page's (class ``k-...``), its shape tells it apart without colours.
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
    """From where to where, and what is written at it.

    Attributes:
        low, high: the ends.
        ticks: values and their text.
        label: what it shows, with its unit.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1; values outside lie on the ends."""
        at = min(self.high, max(self.low, value))
        if self.log:
            return math.log(at / self.low) / math.log(self.high / self.low)
        return (at - self.low) / (self.high - self.low)


def linear_axis(values: Sequence[float], label: str, most: int = 5, include: Sequence[float] = ()) -> Axis:
    """An axis with round ticks, a little wider than the values; those not finite are left out."""
    shown = [value for value in (*values, *include) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    if high - low < 1e-9:
        low, high = low - 0.05 * (abs(low) or 1.0), high + 0.05 * (abs(high) or 1.0)
    room = 0.06 * (high - low)
    start = 0.0 if low == 0.0 in include else low - room  # where 0 is the least that there can be
    step = _round_step((high + room - start) / most)
    first, last = math.ceil(start / step - 1e-9), math.floor((high + room) / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    form = f".{decimals}f" if decimals <= 4 and last * step < 1e5 else ".2g"
    ticks = tuple((n * step, f"{n * step:{form}}".replace("-", "\u2212")) for n in range(first, last + 1))
    return Axis(start, high + room, ticks, label)


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least so large."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def log_axis(values: Sequence[float], label: str, most: int = 5) -> Axis:
    """A logarithmic axis: powers of ten, and 2 and 5 times those where the range is small."""
    low, high = min(values), max(values)
    if high / low < 1.5:
        low, high = low / 1.3, high * 1.3
    room = (high / low) ** 0.06
    low, high = low / room, high * room
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[tuple[float, str]] = []
    plain = low > 0.001 and high < 1e5
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [(f * 10.0**p, _power(f, p, plain)) for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) <= most:
            break
    return Axis(low, high, tuple(found[:: math.ceil(len(found) / most)] if found else ()), label, log=True)


def _power(factor: int, power: int, plain: bool) -> str:
    if plain:
        return f"{factor * 10.0**power:g}"
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if factor == 1 else f"{factor}·10{raised}"


@dataclass(frozen=True)
class Row:
    """One line of a :class:`Rows` chart: a mark, or a bar from 0, with its interval and its value as text."""

    label: str
    value: float | None
    text: str = ""
    interval: tuple[float, float] | None = None
    kind: str = "other"


@dataclass(frozen=True)
class Rows:
    """Names down the side, and a mark with its interval, or a bar, for each.

    Attributes:
        title: what it shows.
        description: what is to be seen, for those who cannot see it.
        rows: from the top.
        axis: of the values.
        lines: values with a label, drawn across all rows.
        bars: bars from 0 instead of marks.
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
        kind: of :data:`KINDS`.
        points: x and y.
        joined: whether a line leads through them.
        marked: whether each has a mark.
        labels: none, or one for each point, all of which are finite; what follows a space is left out on narrow pages.
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
        title: what it shows; small charts show it above the drawing.
        description: what is to be seen, for those who cannot see it.
        series: later ones are drawn over earlier ones.
        x, y: the axes.
        small: one of several side by side.
        strong: the title stands out.
        bars: never; see :class:`Rows`.
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
