from __future__ import annotations

import random

import pytest

from octavo.reports._labels import Box, place

FRAME = Box(0, 0, 600, 400)


def test_box_overlap() -> None:
    box = Box(0, 0, 10, 10)
    assert box.overlap(Box(5, 5, 20, 20)) == 25
    assert box.overlap(Box(10, 0, 20, 10)) == 0, "touching is not covering"
    assert Box(-5, 0, 5, 10).outside(Box(0, 0, 100, 100)) == 50


@pytest.mark.parametrize("seed", range(5))
def test_free_labels_cover_nothing(seed: int) -> None:
    source = random.Random(seed)  # noqa: S311 - not for secrets
    points = [(source.uniform(20, 580), source.uniform(20, 380)) for _ in range(12)]
    taken = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    boxes, free = place(points, [(24.0, 12.0)] * 12, [FRAME] * 12, taken)
    assert free
    for index, box in enumerate(boxes):
        assert box.outside(FRAME) == pytest.approx(0)
        for other in [*taken, *boxes[:index]]:
            assert box.overlap(other) == pytest.approx(0), f"label {index} covers something"


def test_a_crowd_without_room_is_reported() -> None:
    boxes, free = place([(50.0, 50.0)] * 9, [(80.0, 40.0)] * 9, [Box(0, 0, 100, 100)] * 9)
    assert not free
    assert len(boxes) == 9


def test_nothing_to_place() -> None:
    assert place([], [], []) == ([], True)
