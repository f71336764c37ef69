"""Sets of samples that are equal, or nearly equal, from their fingerprints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hf_ft.data.near import near_images, near_texts
from hf_ft.data.prints import Print


def equal_sets(prints: Sequence[Print]) -> list[np.ndarray]:
    """Rows of equal samples, a set for each sample that occurs more than once, in the order of the first rows."""
    return _sets(_numbers(prints))


def near_sets(prints: Sequence[Print]) -> list[np.ndarray]:
    """Rows of nearly equal samples with their equal copies, in the order of the first rows.

    Two samples are in one set if a chain of near pairs leads from one to the other.
    """
    numbers = _numbers(prints)
    firsts = np.unique(numbers, return_index=True)[1]
    known = [number for number, row in enumerate(firsts) if prints[row].sketch is not None]
    if len(known) < 2:
        return []
    sketches = np.stack([np.asarray(prints[firsts[number]].sketch) for number in known])
    pairs = np.asarray(known)[(near_images if sketches.dtype == np.uint8 else near_texts)(sketches)]
    graph = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(len(firsts),) * 2)
    chains = connected_components(graph, directed=False)[1]
    alone = np.ones(len(firsts), dtype=bool)
    alone[pairs.ravel()] = False
    rows = np.flatnonzero(~alone[numbers])
    return [rows[places] for places in _sets(chains[numbers[rows]])]


def _numbers(prints: Sequence[Print]) -> np.ndarray:
    """A number for each row, the same for equal samples, in the order of the first rows."""
    known: dict[bytes, int] = {}
    return np.asarray([known.setdefault(one.same, len(known)) for one in prints], dtype=np.int64)


def _sets(numbers: np.ndarray) -> list[np.ndarray]:
    """The places of each number that occurs more than once, in the order of the first places."""
    order = np.argsort(numbers, kind="stable")
    borders = np.flatnonzero(np.diff(numbers[order])) + 1
    found = [places for places in np.split(order, borders) if len(places) > 1]
    return sorted(found, key=lambda places: int(places[0]))
