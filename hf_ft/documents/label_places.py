"""Where the names of points stand in a chart, so that they hide each other and the marks as little as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LETTER = 6.6  # pixels, about the width of one at the size of the labels
PAGES = NARROW, WIDE = 240, 600  # pixels of a drawing on a phone, and on a wide page
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
    Place(9, 4, "start"),
    Place(-9, 4, "end"),
    Place(0, -10, "middle"),
    Place(0, 19, "middle"),
    Place(8, -14, "start"),
    Place(8, 22, "start"),
    Place(-8, -14, "end"),
    Place(-8, 22, "end"),
)
ROUNDS = 3  # of placing all labels one after the other, each where it hides least of what is there


def placed(
    points: Sequence[tuple[float, float]], labels: Sequence[str], line: Sequence[tuple[float, float]] = ()
) -> list[tuple[Place, str]]:
    """The place of each label, that counts both for a narrow and for a wide page; of equals the first of PLACES.

    Args:
        points: share across, pixels down.
        labels: what follows a space counts on a wide page only, and is dropped where it would hide something there.
        line: points that a line joins, which labels should not lie on.
    """
    drawing = _Drawing(points, list(labels), line)
    chosen = drawing.place_all()
    for number, place in enumerate(chosen):
        others = {i: other for i, other in enumerate(chosen) if i != number}
        if drawing.hidden(place, number, others, WIDE):
            drawing.labels[number] = labels[number].partition(" ")[0]
    return list(zip(drawing.place_all(), drawing.labels, strict=True))


@dataclass(frozen=True)
class _Drawing:
    points: Sequence[tuple[float, float]]
    labels: list[str]
    line: Sequence[tuple[float, float]]

    def place_all(self) -> list[Place]:
        chosen: dict[int, Place] = {}
        for _ in range(ROUNDS):
            for number in range(len(self.points)):
                chosen.pop(number, None)
                hidden = {place: sum(self.hidden(place, number, chosen, page) for page in PAGES) for place in PLACES}
                chosen[number] = min(PLACES, key=hidden.__getitem__)
        return [chosen[number] for number in range(len(self.points))]

    def hidden(self, place: Place, number: int, chosen: Mapping[int, Place], page: int) -> float:
        """What a label would hide, in square pixels; to leave the drawing counts as well."""
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
    """Points on a line, so near to each other that no label fits between."""
    return [
        (a[0] + (b[0] - a[0]) * i / steps, a[1] + (b[1] - a[1]) * i / steps)
        for a, b in zip(line, line[1:], strict=False)
        for i in range(steps)
    ]


def _overlap(a: Box, b: Box) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, across) * max(0.0, down)
