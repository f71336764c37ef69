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
        return "Stage one diverged: its metrics are not finite. Lower the learning rate."
    if f["p_share"] ** 2 + f["n_share"] ** 2 > OFFSET_ENERGY:
        return (
            f"P and N are F plus and minus an offset: their norms are {f['p_share']:.2f} and {f['n_share']:.2f} times "
            "F's. Lower the weight of the MMD, or use the mask."
        )
    if f["reconstruction"] > UNRECONSTRUCTED:
        return (
            f"P + N does not reconstruct F: the error has {f['reconstruction']:.0%} of its energy. Raise the weight of "
            "the reconstruction, or use the mask, which is exact."
        )
    if f["p_share"] < ZERO_SHARE:
        return (
            f"P is zero ({f['p_share']:.1%} of F's norm): the features carry no information about the label, or the "
            "other terms outweigh the classifier's loss. Lower the weight of the bottleneck."
        )
    if f["p_varies"] < CONSTANT_VARIANCE:
        return (
            f"P is constant: its variance is {f['p_varies']:.2%} of F's, so it does not distinguish samples. Lower the "
            "weight of the bottleneck, or check the labels."
        )
    if f["n_varies"] < REST_VARIANCE:
        return (
            f"P equals F: the variance of N is only {f['n_varies']:.1%} of F's, so this regularises like plain "
            "features. Raise the weight of the bottleneck, and lower that of the MMD."
        )
    if f["accuracy"] <= f["chance"]:
        return (
            f"P does not predict the label: the classifier's accuracy is {f['accuracy']:.1%}, and the largest class "
            f"has {f['chance']:.1%} of the samples. The features carry no information about the label, or training is "
            "too short."
        )
    return ""
