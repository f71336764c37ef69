"""What a strategy declares for :func:`hf_ft.advise`: rules with their points, and what a training run costs.

The thresholds and points are judgements based on the papers named here, not fitted to results; what a point is worth
is fitted (:mod:`hf_ft.advice.fit`). The rules here are those that several strategies share.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

GOOD, POOR = 0.8, 0.3  # skill of a linear probe: how far from chance to perfect
FEW, VERY_FEW = 100, 20  # samples of the median class
MEDIUM, SMALL = 0.5, 0.2  # Cohen's words for distances of means in standard deviations

KUMAR = "Kumar et al., ICLR 2022"
YOSINSKI = "Yosinski et al., NeurIPS 2014"
HA = "Ha et al., AAAI 2024"
LEE = "Lee et al., ICLR 2023"
YOU = "You et al., NeurIPS 2020"
_COMPARE = {">=": operator.ge, "<": operator.lt}

# A scale of training cost: among equals, the cheaper is tried first. DEARER separates two of the same class.
HEAD_ALONE, PART_OF_THE_RUN, EVERYTHING, WITH_A_TERM, WITH_A_PASS_BEFORE = 1.0, 2.0, 3.0, 4.0, 5.0
WITH_A_FROZEN_COPY, WITH_A_TRAINING_BEFORE, TWICE_THE_SAMPLES, WITH_A_SEARCH, SEVERAL_MODELS = 6.0, 7.0, 8.0, 9.0, 10.0
DEARER = 0.5


@dataclass(frozen=True)
class Rule:
    """If its conditions hold, the points that a strategy declares for it count.

    Attributes:
        when: figure of :meth:`hf_ft.advice.Signals.figures`, ``>=`` or ``<``, threshold; all must hold, and none holds
            for a figure that was not measured.
        because: the sentence, with the figures in braces.
        source: a paper, or "ours"; empty for a fact.
    """

    when: tuple[tuple[str, str, float], ...]
    because: str
    source: str = "ours"

    def holds(self, figures: Mapping[str, float | None]) -> bool:
        values = [(figures[name], _COMPARE[sign], threshold) for name, sign, threshold in self.when]
        return all(value is not None and compare(value, threshold) for value, compare, threshold in values)

    def text(self, figures: Mapping[str, float | None]) -> str:
        """The sentence with its figures and its source."""
        return self.because.format(**figures) + (f" [{self.source}]" if self.source else "")


GOOD_FEATURES_FEW_SAMPLES = Rule(
    (("probe_skill", ">=", GOOD), ("class_median", "<", FEW)),
    "a linear probe already has skill {probe_skill:.2f}, and {class_median:.0f} samples per class are few: training "
    "everything at once may distort good features",
    KUMAR,
)
GOOD_FEATURES = Rule(
    (("probe_skill", ">=", GOOD), ("class_median", ">=", FEW)),
    "a linear probe has skill {probe_skill:.2f}, and {class_median:.0f} samples per class are enough to improve on it",
    KUMAR,
)
FAIR_FEATURES = Rule(
    (("probe_skill", ">=", POOR), ("probe_skill", "<", GOOD)),
    "a linear probe has skill {probe_skill:.2f}: the features are useful, but not sufficient on their own",
    YOSINSKI,
)
POOR_FEATURES = Rule(
    (("probe_skill", "<", POOR), ("class_median", ">=", FEW)),
    "a linear probe has skill {probe_skill:.2f}, near chance, and {class_median:.0f} samples per class are enough to "
    "change the features",
    YOSINSKI,
)
POOR_FEATURES_FEW_SAMPLES = Rule(
    (("probe_skill", "<", POOR), ("class_median", "<", FEW)),
    "a linear probe has skill {probe_skill:.2f}, and samples are few: preserving features that do not transfer costs "
    "more than it gains",
    "Chen et al., NeurIPS 2019",
)
VERY_FEW_SAMPLES = Rule(
    (("class_median", "<", VERY_FEW), ("probe_skill", ">=", POOR)),
    "{class_median:.0f} samples per class are very few, and a probe skill of {probe_skill:.2f} suggests regularising "
    "towards the pretrained weights",
    "Li et al., ICML 2018; Li et al., ICLR 2019",
)
SHIFTED_MEANS = Rule(
    (("mean_shift", ">=", MEDIUM),),
    "the inputs of BatchNorm are {mean_shift:.2f} standard deviations away from those of pretraining: frozen "
    "statistics do not fit",
    HA,
)
OTHER_SPREADS = Rule(
    (("spread_shift", ">=", math.log(2)),),
    "the inputs of BatchNorm vary on a different scale than in pretraining (|log| {spread_shift:.2f})",
    HA,
)
SAME_MEANS = Rule(
    (("mean_shift", "<", SMALL),),
    "the inputs of BatchNorm are only {mean_shift:.2f} standard deviations away from those of pretraining: there is "
    "little to convert",
)
ONE_PART_STANDS_OUT = Rule(
    (("gradient_ratio", ">=", 3),),
    "one part has {gradient_ratio:.1f} times an even share of the relative gradient: training it alone may be enough",
    f"{LEE}; Barakat and Huang, ICMLA 2023",
)
NO_PART_STANDS_OUT = Rule(
    (("gradient_ratio", "<", 1.5),),
    "the relative gradient is spread evenly (at most {gradient_ratio:.1f} times an even share): no part stands out",
)
LOW_GRADIENT = Rule(
    (("gradient_depth", "<", 1 / 3),),
    "the relative gradient is concentrated in early parts (depth {gradient_depth:.2f}), which this strategy trains "
    "least or last",
    LEE,
)
HIGH_GRADIENT = Rule(
    (("gradient_depth", ">=", 2 / 3),),
    "the relative gradient is concentrated in late parts (depth {gradient_depth:.2f}), which this strategy trains most",
    LEE,
)
FEW_SAMPLES_PER_WEIGHT = Rule(
    (("samples_per_parameter", "<", 1e-4),),
    "{samples_per_parameter:.1e} samples per trainable weight: training fewer weights may be enough",
)
RELATED_SOURCE = Rule(
    (("source_skill", ">=", 0.5), ("source_head", ">=", 1)),
    "the pretrained classes predict the target's with skill {source_skill:.2f}: the pretrained head is worth keeping",
    YOU,
)
UNRELATED_SOURCE = Rule(
    (("source_skill", "<", 0.2),),
    "the pretrained classes say little about the target's (skill {source_skill:.2f})",
)
