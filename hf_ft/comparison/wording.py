"""Numbers of a comparison as text, and what can be said of them in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hf_ft.comparison.results import BASELINE, Results
from hf_ft.comparison.statistics import SAME, Difference, Spread, Standing, winner

SPLIT_NAMES = {"validation": "validation", "test": "test", "ood": "out of distribution"}
MINUS = "\u2212"
PLUS_MINUS = "\u00a0±\u00a0"  # which no line ends within
NONE = "–"  # an empty cell
FEW_SEEDS = 5  # up to here an interval that excludes 0 mostly means that all seeds agree, and chance makes them agree
ALL_OR_NONE = 3  # up to here it means just that


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


def spread(found: Spread | None) -> str:
    """Mean and standard deviation over seeds."""
    if found is None:
        return NONE
    return score(found.mean) + ("" if found.std is None else f"{PLUS_MINUS}{score_like(found.std)}")


def score_like(value: float) -> str:
    """A standard deviation or error: three decimals, also where it is small."""
    return f"{value:.3f}" if value < 1000 else f"{value:.3g}"


def interval(found: Difference) -> str:
    """``[+0.008, +0.034]``."""
    return NONE if found.interval is None else f"[{signed(found.interval[0])}, {signed(found.interval[1])}]"


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


def seeds(n: int) -> str:
    return f"{n} seeds" if n > 1 else "one seed"


def against_full(found: Difference) -> str:
    """A paired difference in words."""
    tally = f"better on {found.wins}, alike on {found.ties}, worse on {found.losses} of {seeds(len(found.by_seed))}"
    if found.interval is None:
        return f"{signed(found.mean)} (one seed, so no interval)"
    return f"{signed(found.mean)}, 95 % interval {interval(found)} ({tally})"


def verdict(results: Results, found: Sequence[Standing]) -> list[str]:
    """Who won, its test score, and how that compares with full fine-tuning."""
    best = winner(results, found)
    if best is None:
        return ["No strategy finished, so there is no winner. What stopped them is listed below."]
    metric, ranked = metric_name(results.metric), [standing for standing in found if standing.rank is not None]
    validation = best.spreads["validation"]
    kind = "highest" if results.greater_is_better else "lowest"
    over = seeds(validation.n)
    if len(ranked) == 1:
        said = [f"Only {code(best.name)} finished: validation {metric} {spread(validation)} ({over})."]
    else:
        said = [
            f"{code(best.name)} has the {kind} mean validation {metric} of {len(ranked)} strategies: "
            f"{spread(validation)} ({over}). Validation alone chose it."
        ]
    if "test" in best.spreads:
        said.append(f"On test, which chose nothing, it scores {spread(best.spreads['test'])}.")
    split = "test" if "test" in best.spreads else "validation"
    if split in best.differences:
        said.append(f"Its difference to full fine-tuning on {split} is {against_full(best.differences[split])}.")
    elif best.name == BASELINE and len(ranked) > 1:
        said.append("That is the baseline itself: no other strategy did better on validation.")
    return said


def cautions(results: Results, found: Sequence[Standing]) -> list[str]:
    """What the figures do not show, and which differences to full fine-tuning they do not settle."""
    ranked = [standing for standing in found if standing.rank is not None]
    if not ranked:
        return []
    split = "test" if any("test" in standing.spreads for standing in ranked) else "validation"
    compared = [standing for standing in ranked if split in standing.differences]
    alone = len(ranked) > 1 and not compared
    return [
        *(["Full fine-tuning has no scores to compare with, so no difference to it is known."] if alone else []),
        *_distinguished(compared, split, results.greater_is_better),
        *_about_seeds(compared, split),
        *_about_the_set(results, ranked, split),
        *_about_choosing(results, ranked, split),
    ]


def _distinguished(compared: Sequence[Standing], split: str, greater_is_better: bool) -> list[str]:
    with_interval = [s for s in compared if s.differences[split].interval is not None]
    if not with_interval:
        return []
    sign = 1 if greater_is_better else -1
    open_ = [s.name for s in with_interval if not s.differences[split].excludes_zero]
    better = [
        s.name for s in with_interval if s.differences[split].excludes_zero and sign * s.differences[split].mean > 0
    ]
    worse = [s.name for s in with_interval if s.name not in (*open_, *better)]
    said = []
    if better:
        said.append(f"Better than full fine-tuning on {split} by an interval that excludes 0: {names(better)}.")
    if worse:
        said.append(f"Worse by such an interval: {names(worse)}.")
    if open_:
        said.append(f"Not distinguishable from full fine-tuning on {split} (the interval holds 0): {names(open_)}.")
    return said


def _about_seeds(compared: Sequence[Standing], split: str) -> list[str]:
    counts = [len(standing.differences[split].by_seed) for standing in compared]
    if not counts:
        return []
    n = min(counts)
    if n == 1:
        return ["There is one seed only: how much the scores vary by chance is not known, and no order is certain."]
    said = [f"The intervals are over {n} seeds only. They cover chance in training, not which rows are in the sets."]
    if n <= FEW_SEEDS:
        alike = 2.0 ** (1 - n)
        said.append(
            f"With {n} seeds they are too narrow: a strategy that equals full fine-tuning is better on all seeds, or "
            f"worse on all, in {alike:.0%} of cases, and then its interval excludes 0."
        )
        if len(compared) > 1:
            least = "about" if n <= ALL_OR_NONE else "at least"
            said[-1] += f" Of {len(compared)} such strategies {least} {len(compared) * alike:.1f} would."
    return said


def _about_the_set(results: Results, ranked: Sequence[Standing], split: str) -> list[str]:
    errors = [standing.standard_errors[split] for standing in ranked if split in standing.standard_errors]
    rows = len(results.labels.get(split, ()))
    if not errors:
        return []
    return [
        f"The {split} set has {rows:,} rows: by that alone, one standard error of a score is about "
        f"{score_like(sum(errors) / len(errors))}. All strategies share the set, so it matters less for differences."
    ]


def _about_choosing(results: Results, ranked: Sequence[Standing], split: str) -> list[str]:
    if len(ranked) == 1:
        return []
    said = []
    first, second = ranked[0].spreads["validation"], ranked[1].spreads["validation"]
    gap = abs(first.mean - second.mean)
    if first.std is not None and gap < first.std:
        said.append(
            f"{code(ranked[1].name)} is second by {score_like(gap)} on validation, less than the winner varies over "
            f"seeds ({score_like(first.std)}): another draw could swap them."
        )
    if split == "validation":
        said.append("Without a test split, the winner's score is that of the best of several: it is too good.")
    return said
