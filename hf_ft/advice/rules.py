"""From signals to an order: a table of rules, each with its figure, its points, its sentence and its source.

A rule gives points to strategies where its figures lie in a range. The strategies are ordered by their sum of points;
of equals the cheaper comes first. The thresholds and points are judgement, made from the papers named here and not
fitted to results: they say what to try first, not what will win.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

from hf_ft.advice.signals import Signals
from hf_ft.core.config import FTConfig, config_class, strategies

__all__ = ["Reason", "Recommendation", "Rule", "recommend", "rules_table"]

GOOD, POOR = 0.8, 0.3  # skill of a linear probe: how far from chance to perfect
FEW, VERY_FEW = 100, 20  # samples of the median class
MEDIUM, SMALL = 0.5, 0.2  # Cohen's words for distances of means in standard deviations

# Of equals, the cheaper first: the head alone; for a part of the run; everything; with a term on weights or features;
# with a pass before; with a frozen copy beside it; with a training before; twice the samples; a search; several models.
NEUTRAL_ORDER = (
    "linear_probe",
    "lp_ft",
    "gradual_unfreezing",
    "full",
    "layer_decay",
    "l2_sp",
    "bss",
    "daft",
    "co_tuning",
    "lwf",
    "attention_transfer",
    "delta",
    "tred",
    "soft",
    "blockwise",
    "amcf",
)

_KUMAR = "Kumar et al., ICLR 2022"
_YOSINSKI = "Yosinski et al., NeurIPS 2014"
_HA = "Ha et al., AAAI 2024"
_LEE = "Lee et al., ICLR 2023"
_COMPARE = {">=": operator.ge, "<": operator.lt}


@dataclass(frozen=True)
class Rule:
    """When its conditions hold, its points count.

    Attributes:
        when: figure, ``>=`` or ``<``, threshold; all must hold, and a figure that was not measured holds nothing.
        points: by strategy; positive speaks for it.
        because: the sentence, with the figures in braces.
        source: a paper, or "ours".
    """

    when: tuple[tuple[str, str, float], ...]
    points: Mapping[str, float]
    because: str
    source: str

    def holds(self, figures: Mapping[str, float | None]) -> bool:
        values = [(figures[name], _COMPARE[sign], threshold) for name, sign, threshold in self.when]
        return all(value is not None and compare(value, threshold) for value, compare, threshold in values)


RULES = (
    Rule((("samples", ">=", 0),), {"full": 1}, "the baseline of every comparison ({samples:.0f} samples)", "ours"),
    Rule(
        (("probe_skill", ">=", GOOD), ("class_median", "<", FEW)),
        {"linear_probe": 3, "lp_ft": 3, "blockwise": 1, "gradual_unfreezing": 1},
        "a linear probe has skill {probe_skill:.2f} already, and {class_median:.0f} samples a class are few: training "
        "everything at once may distort good features",
        _KUMAR,
    ),
    Rule(
        (("probe_skill", ">=", GOOD), ("class_median", ">=", FEW)),
        {"lp_ft": 2, "full": 1, "layer_decay": 1},
        "a linear probe has skill {probe_skill:.2f}, and {class_median:.0f} samples a class allow to go on from it",
        _KUMAR,
    ),
    Rule(
        (("probe_skill", ">=", POOR), ("probe_skill", "<", GOOD)),
        {"full": 1, "lp_ft": 1, "layer_decay": 1, "gradual_unfreezing": 1, "linear_probe": -1},
        "a linear probe has skill {probe_skill:.2f}: the features are a start, not enough by themselves",
        _YOSINSKI,
    ),
    Rule(
        (("probe_skill", "<", POOR), ("class_median", ">=", FEW)),
        {"full": 3, "layer_decay": 2, "daft": 2, "linear_probe": -3, "lp_ft": -1},
        "a linear probe has skill {probe_skill:.2f}, near chance, and {class_median:.0f} samples a class can change "
        "features",
        _YOSINSKI,
    ),
    Rule(
        (("probe_skill", "<", POOR), ("class_median", "<", FEW)),
        {"bss": 2, "full": 1, "daft": 1, "tred": 1, "linear_probe": -2}
        | {"l2_sp": -1, "delta": -1, "attention_transfer": -1},
        "a linear probe has skill {probe_skill:.2f}, and samples are few: holding on to features that do not transfer "
        "costs more than they give",
        "Chen et al., NeurIPS 2019",
    ),
    Rule(
        (("class_median", "<", VERY_FEW), ("probe_skill", ">=", POOR)),
        {"l2_sp": 2, "delta": 1, "bss": 1, "tred": 1, "attention_transfer": 1},
        "{class_median:.0f} samples a class are very few, and a probe of skill {probe_skill:.2f} says that pretrained "
        "weights are worth a pull back to them",
        "Li et al., ICML 2018; Li et al., ICLR 2019",
    ),
    Rule(
        (("mean_shift", ">=", MEDIUM),),
        {"daft": 3, "full": 2, "linear_probe": -2, "lp_ft": -1},
        "the inputs of BatchNorm lie {mean_shift:.2f} standard deviations from the pretraining's: statistics that stay "
        "frozen do not fit",
        _HA,
    ),
    Rule(
        (("spread_shift", ">=", math.log(2)),),
        {"daft": 1, "full": 1, "linear_probe": -1},
        "the inputs of BatchNorm spread by another factor than in the pretraining (|log| {spread_shift:.2f})",
        _HA,
    ),
    Rule(
        (("mean_shift", "<", SMALL),),
        {"linear_probe": 1, "lp_ft": 1, "daft": -1},
        "the inputs of BatchNorm lie only {mean_shift:.2f} standard deviations from the pretraining's: there is little "
        "to convert",
        "ours",
    ),
    Rule(
        (("gradient_ratio", ">=", 3),),
        {"blockwise": 2},
        "one part has {gradient_ratio:.1f} times an even share of the relative gradient: it may be enough to train it",
        f"{_LEE}; Barakat and Huang, ICMLA 2023",
    ),
    Rule(
        (("gradient_ratio", "<", 1.5),),
        {"full": 1, "blockwise": -1},
        "the relative gradient is spread evenly (at most {gradient_ratio:.1f} times an even share): no part stands out",
        "ours",
    ),
    Rule(
        (("gradient_depth", "<", 1 / 3),),
        {"full": 1, "layer_decay": -1, "gradual_unfreezing": -1},
        "the relative gradient lies low (depth {gradient_depth:.2f}), where these train least or last",
        _LEE,
    ),
    Rule(
        (("gradient_depth", ">=", 2 / 3),),
        {"layer_decay": 1, "gradual_unfreezing": 1},
        "the relative gradient lies high (depth {gradient_depth:.2f}), where these train most",
        _LEE,
    ),
    Rule(
        (("samples_per_parameter", "<", 1e-4),),
        {"linear_probe": 1, "blockwise": 1},
        "{samples_per_parameter:.1e} samples for each weight that can train: fewer weights may do",
        "ours",
    ),
    Rule(
        (("source_data", ">=", 1),),
        {"soft": 1},
        "data of the pretraining are at hand ({source_data:.0f} data set)",
        "Zhao et al., 2019",
    ),
    Rule(
        (("source_data", ">=", 1), ("source_skill", ">=", 0.5)),
        {"soft": 2},
        "source data are at hand ({source_data:.0f}), and the pretrained classes tell the target's with skill "
        "{source_skill:.2f}: the tasks are related",
        "Zhao et al., 2019",
    ),
    Rule(
        (("source_skill", ">=", 0.5), ("source_head", ">=", 1)),
        {"co_tuning": 2, "lwf": 1},
        "the pretrained classes tell the target's with skill {source_skill:.2f}: the pretrained head is worth keeping",
        "You et al., NeurIPS 2020",
    ),
    Rule(
        (("class_median", "<", VERY_FEW), ("source_head", ">=", 1)),
        {"co_tuning": 1},
        "{class_median:.0f} samples a class are very few, where the pretrained head adds most",
        "You et al., NeurIPS 2020",
    ),
    Rule(
        (("source_skill", "<", 0.2),),
        {"soft": -1, "co_tuning": -1, "lwf": -1},
        "the pretrained classes say little of the target's (skill {source_skill:.2f})",
        "ours",
    ),
    Rule((("members", ">=", 2),), {"amcf": 3}, "{members:.0f} source models are at hand", "Feng et al., 2024"),
    Rule((("members", "<", 2),), {"amcf": -3}, "{members:.0f} source model is at hand: nothing collaborates", "ours"),
)  # fmt: skip


@dataclass(frozen=True)
class Reason:
    """Why a strategy stands where it does.

    Attributes:
        text: a sentence with the figure in it, and the source.
        figure_name: of :meth:`Signals.figures`, or ``cost_rank``, the place in ``NEUTRAL_ORDER``; empty for none.
        value: the figure.
        points: what it adds to the score.
    """

    text: str
    figure_name: str = ""
    value: float | None = None
    points: float = 0.0


@dataclass(frozen=True)
class Recommendation:
    """A strategy with its score and the reasons for it.

    Attributes:
        usable: whether it can run on what is at hand, with its default options.
    """

    strategy: str
    score: float
    reasons: tuple[Reason, ...]
    usable: bool = True


def recommend(signals: Signals) -> tuple[Recommendation, ...]:
    """Every registered strategy, what to try first in front.

    First those that can run on what is at hand, by score; then those that cannot; at the end those that no rule knows.
    """
    figures = signals.figures()
    found = [_recommendation(name, signals, figures) for name in strategies()]
    return tuple(sorted(found, key=_place))  # stable: unknown ones in the order of their registration


def _place(found: Recommendation) -> tuple[bool, bool, float, int]:
    known = found.strategy in NEUTRAL_ORDER
    return not known, not found.usable, -found.score, NEUTRAL_ORDER.index(found.strategy) if known else 0


def _recommendation(name: str, signals: Signals, figures: Mapping[str, float | None]) -> Recommendation:
    reasons = [_reason(rule, name, figures) for rule in RULES if name in rule.points and rule.holds(figures)]
    missing = _missing(name, config_at_hand(name, signals.source_data), signals)
    if name not in NEUTRAL_ORDER:
        reasons = [Reason("no rule knows it")]
    elif not reasons and not missing:
        rank = NEUTRAL_ORDER.index(name) + 1
        text = f"no rule speaks for or against it; its cost puts it at place {rank} of {len(NEUTRAL_ORDER)}"
        reasons = [Reason(text, "cost_rank", rank)]
    score = sum(reason.points for reason in reasons)
    return Recommendation(name, score, (*missing, *reasons), usable=not missing)


def config_at_hand(name: str, source_data: bool) -> FTConfig | None:
    """A strategy's default config; without source data, its source-free form where it has one.

    None where it has no defaults.
    """
    try:
        config = config_class(name)()
    except (TypeError, ValueError):
        return None
    return config if source_data else config.source_free() or config


def _reason(rule: Rule, name: str, figures: Mapping[str, float | None]) -> Reason:
    figure = rule.when[0][0]
    text = f"{rule.because.format(**figures)} [{rule.source}]"
    return Reason(text, figure, figures[figure], rule.points[name])


def _missing(name: str, config: FTConfig | None, signals: Signals) -> list[Reason]:
    """What the strategy needs and is not at hand."""
    needs = config.requires() if config else frozenset()
    found = []
    if "source_head" in needs and not signals.source_head:
        found.append(Reason("it needs the pretrained head, and there is none (0 kept)", "source_head", 0.0))
    if config and "source_data" in needs and not signals.source_data:
        text = f"it needs data of the pretraining (0 given){config.without_source_data}"
        found.append(Reason(text, "source_data", 0.0))
    if name == "daft" and not signals.batch_norm:
        text = "the model has no BatchNorm to convert (0 layers): daft.convert_batch_norm=False keeps its other half"
        found.append(Reason(text, "batch_norm_layers", 0.0))
    return found


def rules_table() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers, and a row of text for each rule, as the docs show them."""
    rows: list[tuple[str, ...]] = []
    for rule in RULES:
        when = " and ".join(f"`{name}` {sign} {threshold:.3g}" for name, sign, threshold in rule.when)
        points = ", ".join(f"{name} {points:+g}" for name, points in rule.points.items())
        rows.append((when.replace("`samples` >= 0", "always"), points, rule.source))
    return ("when", "points", "source"), rows
