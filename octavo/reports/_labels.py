"""Puts labels beside points so that no label covers another one, a point or the frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Box", "place"]

_DISTANCES = (9.0, 12.0, 16.0, 22.0, 30.0, 40.0)
_ANGLES = (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240)


@dataclass(frozen=True)
class Box:
    """A rectangle; any unit of length, the y axis pointing up."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """The area that both cover; zero where they are apart."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, frame: Box) -> float:
        """The area of this rectangle that lies outside `frame`."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(frame)


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frames: Sequence[Box],
    taken: Sequence[Box] = (),
    unit: float = 1.0,
) -> tuple[list[Box], bool]:
    """Chooses a place for every label, the points in crowded places first.

    Each label takes the nearest free of 72 places around its point; where none is free, the one
    that covers least. The same input always gives the same places.

    Args:
        points: what is labelled.
        sizes: width and height of each label.
        frames: where each label has to stay.
        taken: rectangles that no label should cover (points and their error bars).
        unit: length of one step of distance; a larger one moves labels farther out.

    Returns:
        the rectangle of each label, in the order of `points`, and whether all of them are free.
    """
    chosen: dict[int, Box] = {}
    all_free = True
    for index in sorted(range(len(points)), key=lambda i: (_room(points, i), i)):
        busy = [*taken, *chosen.values()]

        def cost(box: Box, frame: Box = frames[index], busy: Sequence[Box] = busy) -> float:
            return sum(box.overlap(other) for other in busy) + 4 * box.outside(frame)

        candidates = list(_candidates(points[index], sizes[index], unit))
        free = next((box for box in candidates if cost(box) <= 1e-9), None)
        chosen[index] = free or min(candidates, key=cost)
        all_free &= free is not None
    return [chosen[index] for index in range(len(points))], all_free


def _room(points: Sequence[tuple[float, float]], index: int) -> float:
    """Distance from a point to its nearest neighbour."""
    x, y = points[index]
    others = (p for i, p in enumerate(points) if i != index)
    return min((math.hypot(p[0] - x, p[1] - y) for p in others), default=math.inf)


def _candidates(
    point: tuple[float, float], size: tuple[float, float], unit: float
) -> Iterator[Box]:
    """Places around a point, the nearest first."""
    (x, y), (width, height) = point, size
    for distance in _DISTANCES:
        for angle in _ANGLES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # The edge or corner that faces the point keeps the distance.
            left = x + unit * distance * dx - width * (1 - dx) / 2
            bottom = y + unit * distance * dy - height * (1 - dy) / 2
            yield Box(left, bottom, left + width, bottom + height)
