"""Numbers, names and durations as text."""

from __future__ import annotations

import math
from collections.abc import Iterable

MINUS = "\u2212"
PLUS_MINUS = "\u00a0±\u00a0"  # which no line ends within
NONE = "–"  # an empty cell


def code(text: str) -> str:
    """Marks text as code: what stands between backticks is set in a fixed-width font."""
    return f"`{text.replace('`', chr(39))}`"


def code_parts(text: str) -> list[tuple[bool, str]]:
    """A text in parts: whether each is code, and what it says. A backtick without a second one is only a backtick."""
    parts = text.split("`")
    return [(i % 2 == 1, part) for i, part in enumerate(parts) if part] if len(parts) % 2 else [(False, text)]


def names(items: Iterable[str]) -> str:
    """``a, b and c``, each as code."""
    marked = [code(item) for item in items]
    return " and ".join(filter(None, [", ".join(marked[:-1]), *marked[-1:]]))


def metric_name(metric: str) -> str:
    return {"mse": "mean squared error", "mae": "mean absolute error"}.get(metric, metric.replace("_", " "))


def score(value: float | None) -> str:
    """Three decimals, or three digits where these would not show it."""
    if value is None or not math.isfinite(value):
        return NONE
    plain = value == 0 or 0.01 <= abs(value) < 1000
    return (f"{value:.3f}" if plain else f"{value:.3g}").replace("-", MINUS)


def signed(value: float) -> str:
    """With its sign, also where it is too small to be seen; 0 without."""
    shown = score(abs(value)) if abs(value) >= 1000 else f"{abs(value):.3f}"
    return shown if abs(value) < SAME else f"{'+' if value > 0 else MINUS}{shown}"


def score_like(value: float) -> str:
    """A standard deviation or error: three decimals, also where it is small."""
    return f"{value:.3f}" if value < 1000 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """A number of seconds for a table: one decimal below ten."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.1f}" if 0 < value < 9.95 else f"{value:,.0f}"


def duration(value: float) -> str:
    """``1 h 5 min``, ``3 min 20 s``, ``12 s``."""
    whole = round(value)
    for size, unit, smaller, name in ((3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{seconds(value)} s"


def plain(value: object) -> str:
    """A value of an option or a setting."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or "none"
    return "none" if value is None or value == "" else str(value)


SAME = 1e-9  # scores as near as this are a tie: they are means of floats
