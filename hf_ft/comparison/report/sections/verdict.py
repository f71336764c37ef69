"""The conclusions of a comparison and their limits, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_ft.comparison.report.text import against_full, seeds, spread
from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import Difference, Standing, winner
from hf_ft.core.config import BASELINE
from hf_ft.documents.text import SAME, code, metric_name, names, score_like


def verdict(results: Results, standings: Sequence[Standing]) -> list[str]:
    """The winner, its test score, and its difference from full fine-tuning."""
    best = winner(results, standings)
    if best is None:
        return ["No strategy finished, so there is no winner. The reasons are listed below."]
    metric, ranked = metric_name(results.metric), _ranked(standings)
    validation = best.spreads["validation"]
    scored = f"{spread(validation)} ({seeds(validation.n)})"
    if len(ranked) == 1:
        sentences = [f"Only {code(best.name)} finished: validation {metric} {scored}."]
    else:
        kind = "highest" if results.greater_is_better else "lowest"
        sentences = [
            f"{code(best.name)} has the {kind} mean validation {metric} of {len(ranked)} strategies: {scored}.",
            "It was selected on validation alone.",
        ]
    if "test" in best.spreads:
        sentences.append(f"On test, which was not used for selection, it scores {spread(best.spreads['test'])}.")
    split = "test" if "test" in best.spreads else "validation"
    if split in best.differences:
        difference = best.differences[split]
        sentences.append(f"Its difference from full fine-tuning on {split} is {against_full(difference)}.")
        sentences += _judged(difference, split, results.greater_is_better)
    elif best.name == BASELINE and len(ranked) > 1:
        sentences.append("It is the baseline itself: no other strategy did better on validation.")
    return sentences


def _ranked(standings: Sequence[Standing]) -> list[Standing]:
    return [standing for standing in standings if standing.rank is not None]


def _judged(difference: Difference, split: str, greater_is_better: bool) -> list[str]:
    if difference.interval is None:
        return []
    if not difference.excludes_zero:
        return ["The interval includes 0: the two cannot be distinguished."]
    better = (difference.mean > 0) is greater_is_better
    return [] if better else [f"On {split}, full fine-tuning is better: validation did not select the best strategy."]


def cautions(results: Results, standings: Sequence[Standing]) -> list[str]:
    """What the figures do not show, and which differences from full fine-tuning they leave open."""
    ranked = _ranked(standings)
    if not ranked:
        return []
    split = "test" if any("test" in standing.spreads for standing in ranked) else "validation"
    compared = [standing for standing in ranked if split in standing.differences]
    alone = len(ranked) > 1 and not compared
    return [
        *(["Full fine-tuning has no scores, so differences from it are unknown."] if alone else []),
        *_distinguished(compared, split, results.greater_is_better),
        *_about_seeds(compared, split),
        *_about_the_set(results, ranked, split),
        *_about_choosing(ranked, split),
        *_about_validation(results, ranked),
    ]


def main_caution(results: Results, standings: Sequence[Standing]) -> str:
    """The most important caution, for short summaries."""
    ranked = _ranked(standings)
    split = "test" if any("test" in standing.spreads for standing in ranked) else "validation"
    compared = [standing for standing in ranked if split in standing.differences]
    return next(iter([*_about_seeds(compared, split)[-1:], *_about_validation(results, ranked)]), "")


def _distinguished(compared: Sequence[Standing], split: str, greater_is_better: bool) -> list[str]:
    differences = [(s.name, s.differences[split]) for s in compared if s.differences[split].interval is not None]
    if not differences:
        return []
    sign = 1 if greater_is_better else -1
    better = [name for name, d in differences if d.excludes_zero and sign * d.mean > 0]
    worse = [name for name, d in differences if d.excludes_zero and sign * d.mean < 0]
    sentences = [
        f"{word} than full fine-tuning on {split}, with an interval that excludes 0: {names(those)}."
        for word, those in (("Better", better), ("Worse", worse))
        if those
    ]
    open_ = [name for name, d in differences if not d.excludes_zero]
    if open_:
        sentences.append(
            f"Not distinguishable from full fine-tuning on {split} (the interval includes 0): {names(open_)}."
        )
    return sentences


def _about_seeds(compared: Sequence[Standing], split: str) -> list[str]:
    counts = [len(standing.differences[split].by_seed) for standing in compared]
    if not counts:
        return []
    n = min(counts)
    if n == 1:
        return ["There is only one seed: how much the scores vary by chance is unknown, and no ranking is certain."]
    known = [standing.differences[split].uncertainty for standing in compared]
    covered = all(uncertainty is not None and uncertainty.covers_samples for uncertainty in known)
    also = f" and which rows are in the {split} set" if covered else f", not which rows are in the {split} set"
    sentences = [
        f"The intervals cover chance in training ({n} seeds){also}; other training data may change the result more."
    ]
    if len(compared) > 1:
        sentences.append(
            f"Of {len(compared)} strategies equivalent to full fine-tuning, about {0.05 * len(compared):.1g} would be "
            "told apart from it by chance."
        )
    return sentences


def _about_the_set(results: Results, ranked: Sequence[Standing], split: str) -> list[str]:
    errors = [standing.standard_errors[split] for standing in ranked if split in standing.standard_errors]
    rows = len(results.labels.get(split, ()))
    if not errors:
        return []
    return [
        f"The {split} set has {rows:,} rows: this alone gives a score a standard error of about "
        f"{score_like(sum(errors) / len(errors))}. All strategies share the set, so differences are affected less."
    ]


def _about_choosing(ranked: Sequence[Standing], split: str) -> list[str]:
    if len(ranked) == 1:
        return []
    sentences = []
    first, second = ranked[0].spreads["validation"], ranked[1].spreads["validation"]
    gap = abs(first.mean - second.mean)
    if gap < SAME:
        sentences.append(
            f"{code(ranked[1].name)} has the same mean validation score; the tie was broken by the later half of the "
            "epochs, or by order."
        )
    elif first.std is not None and gap < first.std:
        sentences.append(
            f"{code(ranked[1].name)} is second by {score_like(gap)} on validation, less than the winner's standard "
            f"deviation over seeds ({score_like(first.std)}): other seeds could swap them."
        )
    if split == "validation":
        sentences.append("Without a test split, the winner's score is optimistic, because it is the best of several.")
    return sentences


def _about_validation(results: Results, ranked: Sequence[Standing]) -> list[str]:
    """How reliably a small validation set selects; an upper bound, because its predictions are not stored."""
    error = largest_standard_error(results, "validation")
    if error is None or len(ranked) < 2:
        return []
    first, *others = (standing.spreads["validation"].mean for standing in ranked)
    near = sum(abs(mean - first) <= error for mean in others)
    rows = (results.data.get("sizes") or {}).get("validation", 0) * _turns(results)
    if not near:
        return []
    return [
        f"Validation, which selected the winner, has {rows:,} rows: one standard error of a score is up to "
        f"{score_like(error)} there, and {near} of the other {len(others)} strategies lie within that of the winner."
    ]


def largest_standard_error(results: Results, split: str) -> float | None:
    """The maximum of :func:`hf_ft.comparison.statistics.standard_error` on a split; None if undefined."""
    turns = _turns(results) if split == "validation" else 1
    rows = (results.data.get("sizes") or {}).get(split, 0) * turns
    counts = [n * turns for n in (results.data.get("class_counts") or {}).get(split, ()) if n]
    if results.metric == "accuracy" and rows:
        return 0.5 / math.sqrt(rows)
    if results.metric == "balanced_accuracy" and counts:
        return 0.5 * math.sqrt(sum(1 / n for n in counts)) / len(counts)
    return None


def _turns(results: Results) -> int:
    """How many parts of the labelled samples the final runs had as validation in turn."""
    folds = results.settings.get("folds")
    runs = max((len(contender.runs) for contender in results.contenders), default=1)
    return max(1, min(folds, runs)) if isinstance(folds, int) else 1
