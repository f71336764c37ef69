"""Placement of point labels in a chart, with as little overlap with each other and with marks as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LETTER = 6.6  # approximate width of a letter in a label, in pixels
PAGES = NARROW, WIDE = 240, 600  # width of a drawing on a phone and on a wide page, in pixels
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
        others = {i: other for i, other in enumerate(places) if i != number}
        if drawing.hidden(place, number, others, WIDE):
            drawing.labels[number] = labels[number].partition(" ")[0]
    return list(zip(drawing.place_all(), drawing.labels, strict=True))


@dataclass(frozen=True)
class _Drawing:
    points: Sequence[tuple[float, float]]
    labels: list[str]
    line: Sequence[tuple[float, float]]

    def place_all(self) -> list[Place]:
        places: dict[int, Place] = {}
        for _ in range(ROUNDS):
            for number in range(len(self.points)):
                places.pop(number, None)
                hidden = {place: sum(self.hidden(place, number, places, page) for page in PAGES) for place in PLACES}
                places[number] = min(PLACES, key=hidden.__getitem__)
        return [places[number] for number in range(len(self.points))]

    def hidden(self, place: Place, number: int, chosen: Mapping[int, Place], page: int) -> float:
        """The area that a label would cover, in square pixels, plus its area outside the drawing."""
        box = self._box(place, number, page)
        others = [(x * page - MARK, y - MARK, x * page + MARK, y + MARK) for x, y in self.points]
        others += [self._box(other, i, page) for i, other in chosen.items()]
        others += [(x * page - 2, y - 2, x * page + 2, y + 2) for x, y in _along(self.line)]
        outside = max(0.0, -box[0]) + max(0.0, box[2] - page - 10)
        return sum(_overlap(box, other) for other in others) + 20 * outside

    def _box(self, place: Place, number: int, page: int) -> Box:
        x, y = self.points[number]
        label = self.labels[number] if page == WIDE else self.labels[number].partition(" ")[0]
        return place.box(x * page, y, LETTER * len(label))


def _along(line: Sequence[tuple[float, float]], steps: int = 24) -> list[tuple[float, float]]:
    """Points on a line, close enough that no label fits between them."""
    return [
        (a[0] + (b[0] - a[0]) * i / steps, a[1] + (b[1] - a[1]) * i / steps)
        for a, b in zip(line, line[1:], strict=False)
        for i in range(steps)
    ]


def _overlap(a: Box, b: Box) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, across) * max(0.0, down)
