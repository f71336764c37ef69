"""Whether a disentangling is sound, from its figures: the ways in which it can collapse, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Parts that do not overlap have together the energy of F, halves of it have half; more than this cancels out.
OFFSET_ENERGY = 1.5
# A tenth of F's energy is as much as what is often at stake between two layers' features; sound runs are below 0.05.
UNRECONSTRUCTED = 0.1
# P is a point for the features to stay near. Below 1/20 of F's norm that point is the origin: plain shrinking.
ZERO_SHARE = 0.05
# The label's part of F's variance is seldom below 1 %, and half of its amplitude is a quarter of that.
CONSTANT_VARIANCE = 0.001
# All gates above 0.86: the plain feature regulariser, but for one part in fifty.
REST_VARIANCE = 0.02


def judge(figures: Mapping[str, float]) -> str:
    """Which collapse the figures of a disentangler show and what to do about it; empty if none."""
    f = figures
    if not all(math.isfinite(value) for value in f.values()):
        return "Stage one diverged: figures are not finite. Lower its rate."
    if f["p_share"] ** 2 + f["n_share"] ** 2 > OFFSET_ENERGY:
        return (
            f"P and N are F plus and minus an offset: {f['p_share']:.2f} and {f['n_share']:.2f} times F's norm. "
            "Lower the weight of the MMD, or use the mask."
        )
    if f["reconstruction"] > UNRECONSTRUCTED:
        return (
            f"P + N is not F: the error has {f['reconstruction']:.0%} of its energy. Raise the weight of the "
            "reconstruction, or use the mask, which is exact."
        )
    if f["p_share"] < ZERO_SHARE:
        return (
            f"P is zero, {f['p_share']:.1%} of F's norm: the features tell nothing of the label, or the weights of "
            "the other terms are too large beside the classifier's. Lower the bottleneck's."
        )
    if f["p_varies"] < CONSTANT_VARIANCE:
        return (
            f"P is constant: it varies {f['p_varies']:.2%} as much as F does, and tells no sample from another. "
            "Lower the weight of the bottleneck, or look at the labels."
        )
    if f["n_varies"] < REST_VARIANCE:
        return (
            f"P is F: N varies {f['n_varies']:.1%} as much. This regularises like plain features. Raise the weight "
            "of the bottleneck, and lower that of the MMD."
        )
    if f["accuracy"] <= f["chance"]:
        return (
            f"P does not tell the label: the classifier is right in {f['accuracy']:.1%}, the largest class has "
            f"{f['chance']:.1%}. The features tell nothing of it, or training is too short."
        )
    return ""
