"""Where the names of points stand in a chart, so that they hide each other and the marks as little as can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LETTER = 6.6  # pixels, about the width of one at the size of the labels
NARROW, WIDE = 240, 600  # pixels of a drawing on a phone, and on a wide page
MARK = 6  # pixels, half the size of one
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Place:
    """Of a label, from its point, in pixels."""

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
    Place(0, -10, "middle"),
    Place(0, 19, "middle"),
)


def label_places(
    points: Sequence[tuple[float, float]], labels: Sequence[str], line: Sequence[tuple[float, float]] = ()
) -> list[Place]:
    """The place of each label, one after the other, that counts both for a narrow and for a wide page.

    Args:
        points: share across, pixels down.
        labels: what follows a space counts on a wide page only.
        line: points that a line joins, which labels should not lie on.
    """
    chosen: list[Place] = []
    for number in range(len(points)):
        hidden = {place: _hidden(place, number, chosen, points, labels, line) for place in PLACES}
        chosen.append(min(PLACES, key=hidden.__getitem__))
    return chosen


def _hidden(
    place: Place,
    number: int,
    chosen: Sequence[Place],
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    line: Sequence[tuple[float, float]],
) -> float:
    """What a label would hide, in square pixels; to leave the drawing counts as well."""
    total = 0.0
    for page in (NARROW, WIDE):
        box = place.box(points[number][0] * page, points[number][1], _width(labels[number], page))
        others = [(x * page - MARK, y - MARK, x * page + MARK, y + MARK) for x, y in points]
        others += [
            other.box(x * page, y, _width(label, page))
            for other, (x, y), label in zip(chosen, points, labels, strict=False)
        ]
        others += [(x * page - 2, y - 2, x * page + 2, y + 2) for x, y in _along(line)]
        total += sum(_overlap(box, other) for other in others)
        total += 20 * (max(0.0, -box[0]) + max(0.0, box[2] - page - 10))
    return total


def _along(line: Sequence[tuple[float, float]], steps: int = 24) -> list[tuple[float, float]]:
    """Points on a line, so near to each other that no label fits between."""
    return [
        (a[0] + (b[0] - a[0]) * i / steps, a[1] + (b[1] - a[1]) * i / steps)
        for a, b in zip(line, line[1:], strict=False)
        for i in range(steps)
    ]


def _width(label: str, page: int) -> float:
    return LETTER * len(label if page == WIDE else label.partition(" ")[0])


def _overlap(a: Box, b: Box) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, across) * max(0.0, down)
