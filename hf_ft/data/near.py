"""Pairs of nearly equal samples, from their sketches, without comparing every pair.

The thresholds are chosen such that different samples of real data sets stay apart; docs/data_checks.md has the counts.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import KDTree

from hf_ft.data.progress import bar
from hf_ft.data.rows import spread_rows

CORRELATION = (
    0.998  # of the pixels of two sketches: copies after compression, resizing or a change of contrast exceed it
)
CONTRAST = 5.0  # standard deviation in levels of 255 below which all images look alike, and none is compared
JACCARD = 0.8  # share of word sequences that two texts have in common
MOST = 1_000_000  # pairs; more are not listed
_DIRECTIONS = 12  # of largest variance, in which candidates are searched for
_BASIS = 256  # images from which these directions are computed
_BLOCK = 1024
_BANDS = 16  # texts are candidates if all minima of one band agree

NONE = np.zeros((0, 2), dtype=np.int64)


def near_images(sketches: np.ndarray) -> np.ndarray:
    """Pairs of images whose sketches correlate at :data:`CORRELATION` or more.

    Sketches are centred and scaled to unit length, so that the distance of two with correlation r is sqrt(2 - 2 r),
    and no smaller distance is lost in a projection: a k-d tree in the directions of largest variance finds all
    candidates.

    Args:
        sketches: (n, values), uint8.

    Returns:
        (pairs, 2), rows in ascending order; at most about :data:`MOST` pairs.
    """
    contrast = np.concatenate([block.std(axis=1) for block in _blocks(sketches)] or [np.zeros(0)])
    rows = np.flatnonzero(contrast >= CONTRAST)
    if len(rows) < 2:
        return NONE
    sketches = sketches[rows]
    some = _unit(sketches[spread_rows(len(rows), _BASIS)])
    directions = np.linalg.svd(some - some.mean(axis=0), full_matrices=False)[2][:_DIRECTIONS].T
    points = np.concatenate([_unit(block) @ directions for block in _blocks(sketches)])
    tree = KDTree(points)
    reach = np.sqrt(2 - 2 * CORRELATION) + 1e-4  # rounding
    found, number = [NONE], 0
    with bar("comparing images", len(rows), unit=" images") as shown:
        for start in range(0, len(rows), _BLOCK):
            near = tree.query_ball_point(points[start : start + _BLOCK], reach)
            first = np.repeat(np.arange(start, start + len(near)), [len(others) for others in near])
            second = np.concatenate([np.asarray(others, dtype=np.int64) for others in near])
            pairs = np.stack([first, second], axis=1)[second > first]
            confirmed = [part[_correlations(sketches, part) >= CORRELATION] for part in _blocks(pairs)]
            found += confirmed
            number += sum(map(len, confirmed))
            shown.update(len(near))
            if number > MOST:
                break
    return _ordered(rows[np.concatenate(found)])


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]


def _unit(sketches: np.ndarray) -> np.ndarray:
    """Centred and of unit length, (n, values)."""
    centred = sketches.astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


def _correlations(sketches: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", _unit(sketches[pairs[:, 0]]), _unit(sketches[pairs[:, 1]]))


def near_texts(sketches: np.ndarray) -> np.ndarray:
    """Pairs of texts that share about :data:`JACCARD` of their word sequences, estimated from the minima of hashes.

    Of several texts with the same band, consecutive ones are compared: similar texts form a chain.

    Args:
        sketches: (n, hashes), uint32.

    Returns:
        (pairs, 2), rows in ascending order.
    """
    found = [NONE]
    for band in np.split(sketches, _BANDS, axis=1):
        order = np.lexsort(band.T)
        together = (band[order[1:]] == band[order[:-1]]).all(axis=1)
        pairs = np.stack([order[:-1], order[1:]], axis=1)[together]
        shared = (sketches[pairs[:, 0]] == sketches[pairs[:, 1]]).mean(axis=1)
        found.append(pairs[shared >= JACCARD])
    return _ordered(np.concatenate(found))


def _ordered(pairs: np.ndarray) -> np.ndarray:
    return np.unique(np.sort(pairs, axis=1), axis=0)
