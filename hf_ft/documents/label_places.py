"""Placement of point labels in a chart, with as little overlap with each other and with marks as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LETTER = 6.6  # approximate width of a letter in a label, in pixels
SPARE = 3  # by which a short label, such as a number, may be wider
PAGES = NARROW, WIDE = 224, 600  # width of a drawing on a phone and on a wide page, in pixels
MARK = 6  # half the size of a mark, in pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Place:
    """Position of a label relative to its point, in pixels."""

    dx: int
    dy: int
    anchor: str

    def box(self, x: float, y: float, width: float) -> Box:
        left = {"start": 0.0, "end": -width, "middle": -width / 2}[self.anchor] + x + self.dx
        return left, y + self.dy - 10, left + width, y + self.dy + 2


PLACES = (
    Place(8, -4, "start"),
    Place(8, 12, "start"),
    Place(-8, -4, "end"),
    Place(-8, 12, "end"),
    Place(9, 4, "start"),
    Place(-9, 4, "end"),
    Place(0, -10, "middle"),
    Place(0, 19, "middle"),
    Place(8, -14, "start"),
    Place(8, 22, "start"),
    Place(-8, -14, "end"),
    Place(-8, 22, "end"),
)
ROUNDS = 3  # passes over all labels, each moving every label to its best place given the others


def placed(
    points: Sequence[tuple[float, float]], labels: Sequence[str], line: Sequence[tuple[float, float]] = ()
) -> list[tuple[Place, str]]:
    """Place each label for both a narrow and a wide page; among equals, the first of PLACES wins.

    Args:
        points: horizontal position as a share, vertical position in pixels.
        labels: text after a space counts on a wide page only, and is dropped if it would cover something there.
        line: points of a connecting line, which labels should avoid.
    """
    drawing = _Drawing(points, list(labels), line)
    places = drawing.place_all()
    for number, place in enumerate(places):
        others = [i for i in range(len(places)) if i != number]
        if drawing.hidden([place], number, others, WIDE)[0]:
            drawing.labels[number] = labels[number].partition(" ")[0]
            drawing.put(place, number)
    return list(zip(drawing.place_all(), drawing.labels, strict=True))


class _Drawing:
    """The boxes of a drawing, for each page: of marks and the line, which stay, and of labels, as they are placed."""

    def __init__(
        self, points: Sequence[tuple[float, float]], labels: list[str], line: Sequence[tuple[float, float]]
    ) -> None:
        self.points, self.labels = points, labels
        self.marks = {page: _squares(points, page, MARK) for page in PAGES}
        self.line = {page: _squares(_along(line), page, 2) for page in PAGES}
        self.boxes = {page: np.zeros((len(points), 4)) for page in PAGES}

    def place_all(self) -> list[Place]:
        places: dict[int, Place] = {}
        for _ in range(ROUNDS):
            for number in range(len(self.points)):
                places.pop(number, None)
                hidden = [self.hidden(PLACES, number, list(places), page) for page in PAGES]
                by_place = dict(zip(PLACES, map(sum, zip(*hidden, strict=True)), strict=True))
                places[number] = min(PLACES, key=by_place.__getitem__)
                self.put(places[number], number)
        return [places[number] for number in range(len(self.points))]

    def put(self, place: Place, number: int) -> None:
        """Place a label."""
        for page in PAGES:
            self.boxes[page][number] = self._box(place, number, page)

    def hidden(self, places: Sequence[Place], number: int, others: Sequence[int], page: int) -> list[float]:
        """The area that a label would cover at each place, in square pixels, plus its area outside the drawing.

        Args:
            others: the labels that are placed.
        """
        boxes = np.array([self._box(place, number, page) for place in places])
        covered = _overlaps(boxes, np.concatenate([self.marks[page], self.boxes[page][others], self.line[page]]))
        outside = np.maximum(0.0, -boxes[:, 0]) + np.maximum(0.0, boxes[:, 2] - page - 10)
        # Added one at a time, so that equal sets of areas give equal sums, of which the first place wins.
        return [sum(areas[areas > 0].tolist()) + 20 * out for areas, out in zip(covered, outside.tolist(), strict=True)]

    def _box(self, place: Place, number: int, page: int) -> Box:
        x, y = self.points[number]
        label = self.labels[number] if page == WIDE else self.labels[number].partition(" ")[0]
        return place.box(x * page, y, LETTER * len(label) + SPARE)


def _squares(points: Sequence[tuple[float, float]], page: int, half: int) -> np.ndarray:
    """The boxes (n, 4) around points."""
    boxes = [(x * page - half, y - half, x * page + half, y + half) for x, y in points]
    return np.array(boxes, dtype=float).reshape(-1, 4)


def _along(line: Sequence[tuple[float, float]], steps: int = 24) -> list[tuple[float, float]]:
    """Points on a line, close enough that no label fits between them."""
    return [
        (a[0] + (b[0] - a[0]) * i / steps, a[1] + (b[1] - a[1]) * i / steps)
        for a, b in zip(line, line[1:], strict=False)
        for i in range(steps)
    ]


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area (B, O) in which each box (B, 4) overlaps with each of the others (O, 4)."""
    one, other = boxes[:, None], others[None]
    across = np.minimum(one[..., 2], other[..., 2]) - np.maximum(one[..., 0], other[..., 0])
    down = np.minimum(one[..., 3], other[..., 3]) - np.maximum(one[..., 1], other[..., 1])
    return np.maximum(0.0, across) * np.maximum(0.0, down)
