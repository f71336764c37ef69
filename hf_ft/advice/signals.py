"""What the advice is based on: a few figures of a model and a data set, and how to read them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hf_ft.errors import OptionError

__all__ = ["Shift", "Signals", "explained"]


@dataclass(frozen=True)
class Shift:
    r"""How far the target's statistics of one BatchNorm layer's input are from those of the pretraining.

    Both are means over the channels, symmetric in source and target, free of the channels' scale, and 0 where nothing
    differs; variances are taken as the layer does, with its epsilon.

    Attributes:
        mean: :math:`|\mu_t - \mu_s| / \sqrt{(v_s + v_t) / 2}`, Cohen's d: 0.2 is small, 0.5 medium, 0.8 large.
        spread: :math:`|\log(\sigma_t / \sigma_s)|`; 0.69 is a factor of two.
    """

    mean: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Signals:
    r"""Cheap figures of a pretrained model on a target's training data.

    Attributes:
        samples: of the training data.
        class_counts: the samples of each class that has any, the smallest first.
        trainable_parameters: of the model.
        feature_size: D of what goes into the head.
        logme: LogME of the features.
        logme_constant: LogME of one constant feature, with which to compare.
        probe_accuracy: of a linear probe under cross-validation; None where two classes with two samples are missing.
        probe_balanced_accuracy: of that probe.
        probe_std: of the balanced accuracy, over the folds.
        probe_folds: how many.
        source_relation: balanced accuracy of what the pretrained head's classes alone say of the target's, under
            cross-validation; None where the model carries no such head.
        batch_norm: the shift of each BatchNorm layer, by name; empty where the model has none.
        gradients: the share of each part of the backbone in the sum of :math:`\|g_b\| / \|w_b\|`; empty where nothing
            of it trains.
        source_head: whether the pretrained head is at hand.
        source_data: whether data of the pretraining are.
        members: how many source models are.
        forward_samples: samples that went through the model without a gradient.
        backward_samples: samples that went through it with one.
        seconds: what it took.
    """

    samples: int
    class_counts: tuple[int, ...]
    trainable_parameters: int
    feature_size: int
    logme: float
    logme_constant: float
    probe_accuracy: float | None
    probe_balanced_accuracy: float | None
    probe_std: float | None
    probe_folds: int
    source_relation: float | None = None
    batch_norm: Mapping[str, Shift] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)
    source_head: bool = False
    source_data: bool = False
    members: int = 1
    forward_samples: int = 0
    backward_samples: int = 0
    seconds: float = 0.0

    @property
    def classes(self) -> int:
        """How many classes have samples."""
        return len(self.class_counts)

    @property
    def class_min(self) -> int:
        """The samples of the smallest class."""
        return min(self.class_counts)

    @property
    def class_median(self) -> float:
        """The median of the classes' samples."""
        return statistics.median(self.class_counts)

    @property
    def imbalance(self) -> float:
        """The largest class over the smallest."""
        return max(self.class_counts) / self.class_min

    @property
    def samples_per_parameter(self) -> float:
        """Training samples over trainable parameters; infinite where nothing trains."""
        return self.samples / self.trainable_parameters if self.trainable_parameters else math.inf

    @property
    def chance(self) -> float:
        """The balanced accuracy of guessing, and of always saying the largest class: 1 / (classes the probe tells)."""
        return 1 / max(1, sum(count > 1 for count in self.class_counts))  # it leaves out those of one sample

    @property
    def majority(self) -> float:
        """The accuracy of always saying the largest class."""
        return max(self.class_counts) / sum(self.class_counts)

    @property
    def probe_skill(self) -> float | None:
        """The probe's balanced accuracy between chance (0) and perfect (1)."""
        return self._skill(self.probe_balanced_accuracy)

    @property
    def source_skill(self) -> float | None:
        """The same of ``source_relation``."""
        return self._skill(self.source_relation)

    @property
    def evidence_r2(self) -> float:
        r"""The labels' variance that the features explain, by the evidence: :math:`1 - e^{-2 (L - L_0)}`.

        The form of Cox and Snell's pseudo-R², with LogME against that of a constant feature. 0 where the features tell
        no more than a constant.
        """
        return max(0.0, 1 - math.exp(-2 * (self.logme - self.logme_constant)))

    @property
    def batch_norm_layers(self) -> int:
        """How many BatchNorm layers were measured."""
        return len(self.batch_norm)

    @property
    def mean_shift(self) -> float | None:
        """The mean over the BatchNorm layers of ``Shift.mean``; None without any."""
        return statistics.fmean(s.mean for s in self.batch_norm.values()) if self.batch_norm else None

    @property
    def spread_shift(self) -> float | None:
        """The mean over the BatchNorm layers of ``Shift.spread``; None without any."""
        return statistics.fmean(s.spread for s in self.batch_norm.values()) if self.batch_norm else None

    @property
    def gradient_top(self) -> str:
        """The part with the largest share of the relative gradient; empty where there is none."""
        return max(self.gradients, key=lambda name: self.gradients[name], default="")

    @property
    def gradient_ratio(self) -> float | None:
        """The largest share over an even one: 1 where all parts have the same."""
        return max(self.gradients.values()) * len(self.gradients) if self.gradients else None

    @property
    def gradient_depth(self) -> float | None:
        """Where in the backbone the relative gradient is, on average: 0 at the input, 1 at the head."""
        if len(self.gradients) < 2:
            return None
        return sum(share * place for place, share in enumerate(self.gradients.values())) / (len(self.gradients) - 1)

    def figures(self) -> dict[str, float | None]:
        """Every figure that a rule may ask for, by name; None where it could not be measured."""
        return {name: None if (value := getattr(self, name)) is None else float(value) for name in FIGURES}

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; the derived figures come with it, for readers of the file."""
        content = asdict(self) | {"class_counts": list(self.class_counts)}
        derived = {k: v if v is None or math.isfinite(v) else None for k, v in self.figures().items()}
        return content | {"figures": derived}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Signals:
        """What :meth:`to_dict` wrote.

        Raises:
            OptionError: something is missing; the message names it.
        """
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        try:
            shifts = {name: Shift(**shift) for name, shift in known["batch_norm"].items()}
            return cls(**{**known, "class_counts": tuple(known["class_counts"]), "batch_norm": shifts})
        except (KeyError, TypeError) as error:
            raise OptionError(f"these are no signals ({error}): pass what Signals.to_dict wrote.") from error

    def _skill(self, balanced_accuracy: float | None) -> float | None:
        if balanced_accuracy is None or self.chance == 1:
            return None
        return (balanced_accuracy - self.chance) / (1 - self.chance)


FIGURES = (
    "samples",
    "classes",
    "class_min",
    "class_median",
    "imbalance",
    "samples_per_parameter",
    "evidence_r2",
    "probe_skill",
    "source_skill",
    "batch_norm_layers",
    "mean_shift",
    "spread_shift",
    "gradient_ratio",
    "gradient_depth",
    "source_head",
    "source_data",
    "members",
)


def explained(signals: Signals) -> list[tuple[str, str, str]]:
    """The signals for people: what was measured, the figure, and what it means."""
    s = signals
    sizes = f"{s.classes} classes, {s.class_min} to {max(s.class_counts)} samples each"
    evidence = (
        f"a constant feature has {s.logme_constant:.3f}: the features explain {100 * s.evidence_r2:.0f} % of the "
    )
    rows = [
        ("training samples", f"{s.samples:,}", sizes),
        (
            "median class",
            f"{s.class_median:g}",
            "samples; where they are few, it helps to train little, or to hold back",
        ),
        ("imbalance", f"{s.imbalance:.3g}", _imbalance(s)),
        ("samples per weight", f"{s.samples_per_parameter:.1e}", f"{s.trainable_parameters:,} weights can train"),
        ("linear probe", _probe(s), _probe_meaning(s)),
        ("LogME", f"{s.logme:.3f}", f"{evidence}labels' variance, by the evidence"),
    ]
    if s.source_skill is not None:
        rows.append(("source classes", f"{s.source_relation:.3f}", _source_meaning(s)))
    return [*rows, *_shift_rows(s), *_gradient_rows(s), ("at hand", _at_hand(s), "beside the model and the data")]


def _imbalance(s: Signals) -> str:
    if s.imbalance >= 10:
        return "largest class over smallest: look at balanced accuracy, try class_weights='balanced'"
    return "largest class over smallest"


def _probe(s: Signals) -> str:
    return "-" if s.probe_balanced_accuracy is None else f"{s.probe_balanced_accuracy:.3f} ± {s.probe_std:.3f}"


def _probe_meaning(s: Signals) -> str:
    if s.probe_skill is None:
        return "not measured: two classes with two samples each are needed"
    return (
        f"balanced accuracy over {s.probe_folds} folds, chance {s.chance:.3f}: skill {s.probe_skill:.2f} (0 chance, 1 "
        f"perfect); accuracy {s.probe_accuracy:.3f}, the largest class alone {s.majority:.3f}"
    )


def _source_meaning(s: Signals) -> str:
    return f"the same from what the pretrained head predicts: skill {s.source_skill:.2f}, how related the classes are"


def _shift_rows(s: Signals) -> list[tuple[str, str, str]]:
    if not s.batch_norm:
        return [("BatchNorm shift", "-", "the model has no BatchNorm with running statistics")]
    furthest = max(s.batch_norm, key=lambda name: s.batch_norm[name].mean)
    means = (
        "standard deviations from the pretraining's means (0.2 small, 0.5 medium, 0.8 large), over "
        f"{len(s.batch_norm)} layers; most in {furthest}"
    )
    spread = "|log| of the ratio of standard deviations; 0.69 is a factor of two"
    return [
        ("BatchNorm shift, means", f"{s.mean_shift:.2f}", means),
        ("BatchNorm shift, spread", f"{s.spread_shift:.2f}", spread),
    ]


def _gradient_rows(s: Signals) -> list[tuple[str, str, str]]:
    if not s.gradients:
        return [("relative gradient", "-", "nothing of the backbone trains")]
    top = s.gradient_top
    meaning = f"the largest share, {s.gradient_ratio:.1f} times an even one of {len(s.gradients)} parts"
    if s.gradient_depth is not None:
        meaning += f"; on average at depth {s.gradient_depth:.2f} (0 input, 1 head)"
    return [("relative gradient", f"{top} {100 * s.gradients[top]:.0f} %", meaning)]


def _at_hand(s: Signals) -> str:
    things = [("pretrained head", s.source_head), ("source data", s.source_data)]
    found = [name for name, there in things if there] + ([f"{s.members} source models"] if s.members > 1 else [])
    return ", ".join(found) or "nothing"
