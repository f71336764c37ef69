"""Numbers, names and durations as text."""

from __future__ import annotations

import math
from collections.abc import Iterable

MINUS = "\u2212"
PLUS_MINUS = "\u00a0±\u00a0"  # with non-breaking spaces
NONE = "–"  # an empty cell


def code(text: str) -> str:
    """Mark text as code: backticks enclose text in a fixed-width font."""
    return f"`{text.replace('`', chr(39))}`"


def code_parts(text: str) -> list[tuple[bool, str]]:
    """Split a text into (is code, text) parts. An unpaired backtick is an ordinary character."""
    parts = text.split("`")
    return [(i % 2 == 1, part) for i, part in enumerate(parts) if part] if len(parts) % 2 else [(False, text)]


def counted(number: float, noun: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'' if number == 1 else 's'}"


def names(items: Iterable[str]) -> str:
    """``a, b and c``, each as code."""
    codes = [code(item) for item in items]
    return " and ".join(filter(None, [", ".join(codes[:-1]), *codes[-1:]]))


METRICS = {"mse": "mean squared error", "mae": "mean absolute error", "ece": "expected calibration error"}


def metric_name(metric: str) -> str:
    return METRICS.get(metric, metric.replace("_", " "))


def score(value: float | None) -> str:
    """Format with three decimals, or three significant digits if three decimals would show nothing."""
    if value is None or not math.isfinite(value):
        return NONE
    plain = value == 0 or 0.01 <= abs(value) < 1000
    return (f"{value:.3f}" if plain else f"{value:.3g}").replace("-", MINUS)


def signed(value: float) -> str:
    """Format with a sign, even if the value rounds to 0; an exact 0 has none."""
    text = score(abs(value)) if abs(value) >= 1000 else f"{abs(value):.3f}"
    return text if abs(value) < SAME else f"{'+' if value > 0 else MINUS}{text}"


def score_like(value: float) -> str:
    """Format a standard deviation or error with three decimals, even if small."""
    return f"{value:.3f}" if value < 1000 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """Format seconds for a table: one decimal below ten."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.1f}" if 0 < value < 9.95 else f"{value:,.0f}"


def duration(value: float) -> str:
    """Format a duration: ``1 h 5 min``, ``3 min 20 s``, ``12 s``."""
    whole = round(value)
    for size, unit, smaller, name in ((3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{seconds(value)} s"


def plain(value: object) -> str:
    """Format the value of an option or setting."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or "none"
    return "none" if value is None or value == "" else str(value)


SAME = 1e-9  # scores this close are tied: they are means of floats
