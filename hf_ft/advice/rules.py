"""Rank the strategies by what they gained in earlier comparisons and by the rules that hold for the signals.

A rule (:mod:`hf_ft.core.advising`) gives a strategy points if the rule's figures lie in a given range. What a point is
worth, and what each strategy gains without any, is fitted to earlier comparisons (:mod:`hf_ft.advice.evidence`). Ties
go to the cheaper strategy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hf_ft.advice.evidence import Evidence, shipped
from hf_ft.advice.signals import FIGURES, Signals
from hf_ft.core.advising import Rule
from hf_ft.core.config import BASELINE, FTConfig, config_class, strategies

__all__ = ["Reason", "Recommendation", "declared_rules", "neutral_order", "recommend", "rule_points", "rules_table"]


@dataclass(frozen=True)
class Reason:
    """One reason for a strategy's rank.

    Attributes:
        text: a sentence that states the figure and the source.
        figure_name: a key of :meth:`Signals.figures`, or ``mean_gain``, the gain over full fine-tuning in earlier
            comparisons, or ``cost_rank``, the rank in :func:`neutral_order`; may be empty.
        value: value of the figure.
        points: contribution to the score.
    """

    text: str
    figure_name: str = ""
    value: float | None = None
    points: float = 0.0


@dataclass(frozen=True)
class Recommendation:
    """A strategy with its score and the reasons for it.

    Attributes:
        score: expected gain in balanced accuracy over full fine-tuning, as a fraction.
        usable: whether it can run with its default options and what is available.
    """

    strategy: str
    score: float
    reasons: tuple[Reason, ...]
    usable: bool = True


def neutral_order() -> tuple[str, ...]:
    """Strategies that declare a cost or rules, cheapest first."""
    known = {name: kind for name, kind in strategies().items() if kind.advice or kind.cost is not None}
    costs = {name: math.inf if kind.cost is None else kind.cost for name, kind in known.items()}
    return tuple(sorted(costs, key=lambda name: costs[name]))


def declared_rules() -> dict[Rule, dict[str, float]]:
    """Every rule with its points by strategy, ordered by the figures it uses."""
    rules: dict[Rule, dict[str, float]] = {}
    for name in neutral_order():
        for rule, points in config_class(name).advice.items():
            if points is not None:
                rules.setdefault(rule, {})[name] = points
    places = list(FIGURES)
    return dict(sorted(rules.items(), key=lambda item: [places.index(name) for name, _, _ in item[0].when]))


def recommend(signals: Signals, evidence: Evidence | None = None) -> tuple[Recommendation, ...]:
    """Rank every registered strategy, most promising first.

    Strategies that can run with what is available come first, by score, then those that cannot; strategies that
    declare neither cost nor rules come last.

    Args:
        signals: the figures of model and data.
        evidence: what earlier comparisons say; None for those behind docs/results.md.
    """
    figures, order = signals.figures(), neutral_order()
    evidence = shipped() if evidence is None else evidence
    recommendations = [_recommendation(name, signals, figures, order, evidence) for name in strategies()]

    def place(one: Recommendation) -> tuple[bool, bool, float, int]:
        known = one.strategy in order
        return not known, not one.usable, -one.score, order.index(one.strategy) if known else 0

    return tuple(sorted(recommendations, key=place))  # stable: undeclared strategies keep their registration order


def rule_points(signals: Signals) -> dict[str, float]:
    """The points that the rules give to each strategy."""
    figures = signals.figures()
    return {name: sum(points or 0.0 for _, points in _holding(name, figures)) for name in neutral_order()}


def _holding(name: str, figures: Mapping[str, float | None]) -> list[tuple[Rule, float | None]]:
    return [(rule, points) for rule, points in config_class(name).advice.items() if rule.holds(figures)]


def _recommendation(
    name: str, signals: Signals, figures: Mapping[str, float | None], order: tuple[str, ...], evidence: Evidence
) -> Recommendation:
    holding, worth = _holding(name, figures), evidence.worth
    reasons = _experience(name, evidence) if name in order else []
    reasons += [_reason(rule, worth * points, figures) for rule, points in holding if points is not None]
    missing = _missing(config_at_hand(name, signals.source_data), signals)
    missing += [_reason(rule, 0.0, figures) for rule, points in holding if points is None]
    if name not in order:
        reasons = [Reason("no rule covers it")]
    elif not reasons and not missing:
        rank = order.index(name) + 1
        text = f"no rule applies; by cost it ranks {rank} of {len(order)}"
        reasons = [Reason(text, "cost_rank", rank)]
    score = sum(reason.points for reason in reasons)
    return Recommendation(name, score, (*missing, *reasons), usable=not missing)


def _experience(name: str, evidence: Evidence) -> list[Reason]:
    """What earlier comparisons say about a strategy; nothing about the baseline that all are compared with."""
    if name == BASELINE or not evidence.gains:
        return []
    expected = evidence.expected(name)
    if name not in evidence.gains:
        return [Reason("not compared yet: it counts as an average strategy", "mean_gain", 0.0, expected)]
    gain = evidence.gains[name]
    tasks = f"{gain.tasks} task{'s' * (gain.tasks > 1)}"
    text = f"over full fine-tuning it gained {100 * gain.mean:+.1f} points on average in our comparisons on {tasks}"
    return [Reason(text, "mean_gain", gain.mean, expected)]


def config_at_hand(name: str, source_data: bool) -> FTConfig | None:
    """A strategy's default config; without source data, its source-free form if it has one.

    None if it cannot be created without arguments.
    """
    try:
        config = config_class(name)()
    except (TypeError, ValueError):
        return None
    return config if source_data else config.source_free() or config


def _reason(rule: Rule, points: float, figures: Mapping[str, float | None]) -> Reason:
    figure = rule.when[0][0]
    return Reason(rule.text(figures), figure, figures[figure], points)


def _missing(config: FTConfig | None, signals: Signals) -> list[Reason]:
    """What the strategy needs that is not available."""
    if config is None:
        return []
    needs, reasons = config.needs(), []
    if needs.source_head and not signals.source_head:
        reasons.append(Reason("it needs the pretrained head, but there is none (0 kept)", "source_head", 0.0))
    if needs.source_data == "required" and not signals.source_data:
        text = f"it needs pretraining data (0 given){needs.without_source_data}"
        reasons.append(Reason(text, "source_data", 0.0))
    return reasons


def rules_table() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and one row of text per rule, for the documentation."""
    rows: list[tuple[str, ...]] = []
    for rule, by_name in declared_rules().items():
        when = " and ".join(f"`{name}` {sign} {threshold:.3g}" for name, sign, threshold in rule.when)
        ordered = sorted(by_name.items(), key=lambda item: -item[1])
        points = ", ".join(f"{name} {points:+g}" for name, points in ordered)
        rows.append((when.replace("`samples` >= 0", "always"), points, rule.source))
    return ("when", "points", "source"), rows
