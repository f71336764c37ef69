"""Detect from its figures whether a disentanglement has collapsed, and how to fix it."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Disjoint parts have F's energy in total, two halves have half of it; with more than this, the parts cancel out.
OFFSET_ENERGY = 1.5
# A tenth of F's energy is often as large as the difference between two layers' features; sound runs stay below 0.05.
UNRECONSTRUCTED = 0.1
# Features are kept close to P. Below 1/20 of F's norm, P is practically the origin, and the term merely shrinks them.
ZERO_SHARE = 0.05
# The label rarely explains less than 1 % of F's variance, and half its amplitude is a quarter of that.
CONSTANT_VARIANCE = 0.001
# All gates above 0.86: within one part in fifty of the plain feature regulariser.
REST_VARIANCE = 0.02


def judge(figures: Mapping[str, float]) -> str:
    """Describe the collapse that a disentangler's figures show, and how to fix it; empty if there is none."""
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
