"""Places names beside the points of a picture of known size, so that they cover no point and no other name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LETTER, LINE = 6.4, 13.0
"""About how wide a letter and how high a line of 11 px is."""
RADIUS = 7.0


@dataclass(frozen=True)
class Label:
    """A name's place: pixels from its point to its anchor, which is at its left or right end or its middle."""

    dx: float
    dy: float
    align: Literal["left", "right", "center"]


_PLACES = (
    Label(RADIUS + 3, 0, "left"),
    Label(-RADIUS - 3, 0, "right"),
    Label(0, -RADIUS - 7, "center"),
    Label(0, RADIUS + 8, "center"),
    Label(RADIUS, -RADIUS - 5, "left"),
    Label(RADIUS, RADIUS + 5, "left"),
    Label(-RADIUS, -RADIUS - 5, "right"),
    Label(-RADIUS, RADIUS + 5, "right"),
    Label(RADIUS + 3, -2 * RADIUS - 3, "left"),
    Label(-RADIUS - 3, -2 * RADIUS - 3, "right"),
    Label(RADIUS + 3, 2 * RADIUS + 3, "left"),
    Label(-RADIUS - 3, 2 * RADIUS + 3, "right"),
    Label(0, -2 * RADIUS - 13, "center"),
    Label(0, 2 * RADIUS + 14, "center"),
)

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""


@dataclass(frozen=True)
class Placed:
    """Names beside their points."""

    labels: tuple[Label, ...]
    covered: float
    """Square pixels of names that lie on points, on other names or outside the picture; 0 where all had room."""


def placed(
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    size: tuple[float, float],
    taken: Sequence[Box] = (),
) -> Placed:
    """A place for the name of each point (x, y from the top left, in pixels) within a picture of this size.

    Each takes, in turn, the first place that is free, or else the one that covers least; `taken` are places of other
    words.
    """
    taken = [*taken, *((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in points)]
    labels, all_covered = [], 0.0
    for (x, y), name in zip(points, names, strict=True):
        boxes = [_box(x + one.dx, y + one.dy, one, LETTER * len(name)) for one in _PLACES]
        covered = [
            sum(_overlap(box, other) for other in taken) + 4 * _outside(box, size) for box in boxes
        ]
        best = covered.index(min(covered))
        taken.append(boxes[best])
        labels.append(_PLACES[best])
        all_covered += covered[best]
    return Placed(tuple(labels), all_covered)


def _box(x: float, y: float, label: Label, width: float) -> Box:
    left = {"left": x, "right": x - width, "center": x - width / 2}[label.align]
    return left, y - LINE / 2, left + width, y + LINE / 2


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box, size: tuple[float, float]) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return area - _overlap(box, (0.0, 0.0, *size))
