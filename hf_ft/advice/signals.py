"""The signals behind the advice: a few figures of a model and a data set, and how to read them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_ft.records import restored

__all__ = ["Shift", "Signals", "explained"]


@dataclass(frozen=True)
class Shift:
    r"""The shift of one BatchNorm layer's input statistics from pretraining to target.

    Both values are averaged over the channels, symmetric in source and target, independent of the channels' scale, and
    0 if the statistics agree; variances include the layer's epsilon.

    Attributes:
        mean: :math:`|\mu_t - \mu_s| / \sqrt{(v_s + v_t) / 2}`, Cohen's d: 0.2 is small, 0.5 medium, 0.8 large.
        spread: :math:`|\log(\sigma_t / \sigma_s)|`; 0.69 is a factor of two.
    """

    mean: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Signals:
    r"""Cheap figures of a pretrained model on the target's training data.

    Attributes:
        samples: number of training samples, without those that have no label (-100).
        class_counts: samples per non-empty class, smallest first.
        trainable_parameters: number of trainable parameters of the model.
        feature_size: dimension D of the head's input.
        logme: LogME of the features.
        logme_constant: LogME of a single constant feature, as a baseline.
        probe_accuracy: cross-validated accuracy of a linear probe; None unless two classes have at least two samples.
        probe_balanced_accuracy: balanced accuracy of the same probe.
        probe_std: standard deviation of the balanced accuracy over the folds.
        probe_folds: number of folds.
        probe_classes: number of classes that the probe distinguishes: not those with a single sample or, if folds
            consist of whole groups, in a single group. None if unknown, in files of earlier versions.
        source_relation: cross-validated balanced accuracy of predicting the target classes from the pretrained head's
            classes alone; None if the model carries no pretrained head.
        batch_norm: shift of each BatchNorm layer, by name; empty if the model has none.
        gradients: each backbone part's share of the sum of :math:`\|g_b\| / \|w_b\|`; empty if no backbone parameter
            is trainable.
        source_head: whether the pretrained head is available.
        source_data: whether pretraining data are available.
        members: number of source models available.
        forward_samples: samples passed through the model without gradients.
        backward_samples: samples passed through it with gradients.
        seconds: time the measurement took.
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
    probe_classes: int | None = None
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
        """Number of classes with samples."""
        return len(self.class_counts)

    @property
    def class_min(self) -> int:
        """Number of samples in the smallest class."""
        return min(self.class_counts)

    @property
    def class_median(self) -> float:
        """Median number of samples per class."""
        return statistics.median(self.class_counts)

    @property
    def imbalance(self) -> float:
        """Ratio of the largest class to the smallest."""
        return max(self.class_counts) / self.class_min

    @property
    def samples_per_parameter(self) -> float:
        """Training samples per trainable parameter; infinite if nothing is trainable."""
        return self.samples / self.trainable_parameters if self.trainable_parameters else math.inf

    @property
    def chance(self) -> float:
        """Balanced accuracy of guessing or of always predicting one class: 1 / (number of classes probed)."""
        several = sum(count > 1 for count in self.class_counts)
        return 1 / max(1, several if self.probe_classes is None else self.probe_classes)

    @property
    def majority(self) -> float:
        """Accuracy of always predicting the largest class."""
        return max(self.class_counts) / sum(self.class_counts)

    @property
    def probe_skill(self) -> float | None:
        """The probe's balanced accuracy, rescaled from chance (0) to perfect (1)."""
        return self._skill(self.probe_balanced_accuracy)

    @property
    def source_skill(self) -> float | None:
        """``source_relation``, rescaled from chance (0) to perfect (1)."""
        return self._skill(self.source_relation)

    @property
    def evidence_r2(self) -> float:
        r"""Share of label variance explained by the features, from the evidence: :math:`1 - e^{-2 (L - L_0)}`.

        Cox and Snell's pseudo-R² with the LogME of the features and that of a constant feature. 0 if the features are
        no more informative than a constant.
        """
        return max(0.0, 1 - math.exp(-2 * (self.logme - self.logme_constant)))

    @property
    def batch_norm_layers(self) -> int:
        """Number of BatchNorm layers measured."""
        return len(self.batch_norm)

    @property
    def mean_shift(self) -> float | None:
        """Mean of ``Shift.mean`` over the BatchNorm layers; None if there are none."""
        return statistics.fmean(s.mean for s in self.batch_norm.values()) if self.batch_norm else None

    @property
    def spread_shift(self) -> float | None:
        """Mean of ``Shift.spread`` over the BatchNorm layers; None if there are none."""
        return statistics.fmean(s.spread for s in self.batch_norm.values()) if self.batch_norm else None

    @property
    def gradient_top(self) -> str:
        """The part with the largest share of the relative gradient; empty if there is none."""
        return max(self.gradients, key=lambda name: self.gradients[name], default="")

    @property
    def gradient_ratio(self) -> float | None:
        """Ratio of the largest share to a uniform one: 1 if all parts have the same share."""
        return max(self.gradients.values()) * len(self.gradients) if self.gradients else None

    @property
    def gradient_depth(self) -> float | None:
        """Mean depth of the relative gradient in the backbone: 0 at the input, 1 at the head."""
        if len(self.gradients) < 2:
            return None
        return sum(share * place for place, share in enumerate(self.gradients.values())) / (len(self.gradients) - 1)

    def figures(self) -> dict[str, float | None]:
        """Every figure that a rule can refer to, by name; None if it could not be measured."""
        return {name: None if (value := getattr(self, name)) is None else float(value) for name in FIGURES}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serializable dictionary, including the derived figures for readers of the file."""
        content = asdict(self) | {"class_counts": list(self.class_counts)}
        derived = {k: v if v is None or math.isfinite(v) else None for k, v in self.figures().items()}
        return content | {"figures": derived}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Signals:
        """Read the output of :meth:`to_dict`.

        Raises:
            CheckpointError: if a field is missing or of another type; the message names it.
        """
        return restored(cls, content, "signals")

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
    """The signals in readable form: what was measured, the figure, and its meaning."""
    s = signals
    sizes = f"{s.classes} classes, {s.class_min} to {max(s.class_counts)} samples each"
    evidence = (
        f"a constant feature has {s.logme_constant:.3f}; by the evidence, the features explain "
        f"{100 * s.evidence_r2:.0f} % of the "
    )
    rows = [
        ("training samples", f"{s.samples:,}", sizes),
        (
            "median class",
            f"{s.class_median:g}",
            "samples; with few of them, train fewer weights or regularise more",
        ),
        ("imbalance", f"{s.imbalance:.3g}", _imbalance(s)),
        ("samples per weight", f"{s.samples_per_parameter:.1e}", f"{s.trainable_parameters:,} trainable weights"),
        ("linear probe", _probe(s), _probe_meaning(s)),
        ("LogME", f"{s.logme:.3f}", f"{evidence}labels' variance"),
    ]
    if s.source_skill is not None:
        rows.append(("source classes", f"{s.source_relation:.3f}", _source_meaning(s)))
    return [
        *rows,
        *_shift_rows(s),
        *_gradient_rows(s),
        ("available", _at_hand(s), "in addition to the model and the data"),
    ]


def _imbalance(s: Signals) -> str:
    if s.imbalance >= 10:
        return "largest class over smallest: use balanced accuracy, and try class_weights='balanced'"
    return "largest class over smallest"


def _probe(s: Signals) -> str:
    return "-" if s.probe_balanced_accuracy is None else f"{s.probe_balanced_accuracy:.3f} ± {s.probe_std:.3f}"


def _probe_meaning(s: Signals) -> str:
    if s.probe_skill is None:
        return "not measured: needs two classes with two samples each"
    return (
        f"balanced accuracy over {s.probe_folds} folds, chance {s.chance:.3f}: skill {s.probe_skill:.2f} (0 chance, 1 "
        f"perfect); accuracy {s.probe_accuracy:.3f}, majority class {s.majority:.3f}"
    )


def _source_meaning(s: Signals) -> str:
    return (
        f"the same from the pretrained head's predictions: skill {s.source_skill:.2f}, a measure of how related the "
        "classes are"
    )


def _shift_rows(s: Signals) -> list[tuple[str, str, str]]:
    if not s.batch_norm:
        return [("BatchNorm shift", "-", "the model has no BatchNorm with running statistics")]
    furthest = max(s.batch_norm, key=lambda name: s.batch_norm[name].mean)
    means = (
        f"standard deviations from the pretraining means (0.2 small, 0.5 medium, 0.8 large), over {len(s.batch_norm)} "
        f"layers; largest in {furthest}"
    )
    spread = "|log| of the ratio of standard deviations; 0.69 is a factor of two"
    return [
        ("BatchNorm shift, means", f"{s.mean_shift:.2f}", means),
        ("BatchNorm shift, spread", f"{s.spread_shift:.2f}", spread),
    ]


def _gradient_rows(s: Signals) -> list[tuple[str, str, str]]:
    if not s.gradients:
        return [("relative gradient", "-", "no part of the backbone is trained")]
    top = s.gradient_top
    meaning = f"the largest of {len(s.gradients)} shares, {s.gradient_ratio:.1f} times an even one"
    if s.gradient_depth is not None:
        meaning += f"; mean depth {s.gradient_depth:.2f} (0 input, 1 head)"
    return [("relative gradient", f"{top} {100 * s.gradients[top]:.0f} %", meaning)]


def _at_hand(s: Signals) -> str:
    things = [("pretrained head", s.source_head), ("source data", s.source_data)]
    available = [name for name, there in things if there] + ([f"{s.members} source models"] if s.members > 1 else [])
    return ", ".join(available) or "nothing"
