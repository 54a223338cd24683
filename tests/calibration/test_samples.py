"""Which samples are kept and which are held back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibration.samples import HoldOutSplit, Reservoir
from octavo.core.results import TensorSpec

Array = np.ndarray[Any, Any]
DYNAMIC = (TensorSpec("x", ("batch", 2), "float32"),)
STATIC = (TensorSpec("x", (3, 2), "float32"),)
MIXED = (TensorSpec("x", ("batch", 2), "float32"), TensorSpec("s", (1,), "float32"))


def numbered(start: int, size: int) -> dict[str, Array]:
    """Samples that hold their own number."""
    return {"x": np.repeat(np.arange(start, start + size, dtype=np.float32), 2).reshape(size, 2)}


def numbers(samples: list[dict[str, Array]]) -> list[int]:
    return [int(number) for sample in samples for number in sample["x"][:, 0]]


def divided(split: HoldOutSplit, sizes: list[int]) -> list[int]:
    """Offers batches of these sizes; returns the samples to calibrate on."""
    seen, start = [], 0
    for size in sizes:
        seen += numbers(split.divide(numbered(start, size)))
        start += size
    return seen


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 6), st.integers(0, 9))
def test_every_sample_is_either_held_back_or_calibrated_on(
    sizes: list[int], hold_back: int, keep: int
) -> None:
    split = HoldOutSplit(DYNAMIC, hold_back, keep)
    seen, total = divided(split, sizes), sum(sizes)
    held, kept = numbers(split.held.samples), numbers(split.kept.samples)
    assert sorted(seen + held) == list(range(total))
    assert len(held) == min(hold_back, total // HoldOutSplit.EVERY)
    assert len(kept) == min(keep, len(seen))
    assert set(kept) <= set(seen), "what is kept for later was calibrated on"
    assert all(index % HoldOutSplit.EVERY == HoldOutSplit.EVERY - 1 for index in held)
    assert 0 in seen, "the first sample is never held back"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_how_samples_are_batched_does_not_matter(sizes: list[int], hold_back: int) -> None:
    one, two = HoldOutSplit(DYNAMIC, hold_back, 4), HoldOutSplit(DYNAMIC, hold_back, 4)
    assert sorted(divided(one, sizes)) == sorted(divided(two, [1] * sum(sizes)))
    assert numbers(one.held.samples) == numbers(two.held.samples)
    assert numbers(one.kept.samples) == numbers(two.kept.samples)


def test_held_back_samples_are_spread_over_the_stream() -> None:
    few, many = HoldOutSplit(DYNAMIC, 5, 0), HoldOutSplit(DYNAMIC, 24, 0)
    divided(few, [7] * 3)
    assert numbers(few.held.samples) == [3, 7, 11, 15, 19]
    divided(many, [50] * 100)
    thirds = Counter(number // 1667 for number in numbers(many.held.samples))
    assert all(3 <= thirds[third] <= 16 for third in range(3)), "not only the start of the data"


def test_a_reservoir_is_a_fair_choice_of_the_whole_stream() -> None:
    counts: Counter[int] = Counter()
    for trial in range(300):
        reservoir = Reservoir(10)
        reservoir._random.seed(trial)
        for index in range(100):
            reservoir.add(numbered(index, 1))
        kept = numbers(reservoir.samples)
        assert len(set(kept)) == 10
        counts.update(kept)
    # 30 expected each; five standard deviations of a binomial
    assert all(30 - 26 <= counts[index] <= 30 + 26 for index in range(100))


def test_the_choice_is_the_same_in_every_run() -> None:
    chosen = []
    for _ in range(2):
        split = HoldOutSplit(DYNAMIC, 3, 5)
        divided(split, [10] * 10)
        chosen.append((numbers(split.held.samples), numbers(split.kept.samples)))
    assert chosen[0] == chosen[1]
    assert max(chosen[0][1]) > 20, "late samples have their chance"


def test_samples_are_copies() -> None:
    reservoir, batch = Reservoir(4), numbered(0, 2)
    for offset in range(2):
        reservoir.add({"x": batch["x"][offset : offset + 1]})
    batch["x"][:] = -1  # loaders reuse their buffers
    assert numbers(reservoir.samples) == [0, 1]


def test_samples_are_joined_to_one_batch() -> None:
    split = HoldOutSplit(DYNAMIC, 4, 8)
    divided(split, [8, 8])
    (held,) = split.held.batches()
    assert held["x"].shape == (4, 2)
    assert numbers([held]) == [3, 7, 11, 15]


def test_nothing_kept_is_no_batch() -> None:
    assert Reservoir(0).batches() == []
    reservoir = Reservoir(0)
    reservoir.add(numbered(0, 1))
    assert reservoir.batches() == []


def test_samples_of_different_shapes_stay_apart() -> None:
    reservoir = Reservoir(4)
    reservoir.add({"x": np.zeros((1, 2), np.float32)})
    reservoir.add({"x": np.zeros((1, 3), np.float32)})
    assert [sample["x"].shape for sample in reservoir.batches()] == [(1, 2), (1, 3)]


@pytest.mark.parametrize("specs", [STATIC, MIXED], ids=["static", "mixed"])
def test_batches_of_a_fixed_size_stay_whole(specs: tuple[TensorSpec, ...]) -> None:
    split = HoldOutSplit(specs, 2, 9)
    seen = []
    for index in range(8):
        feeds = numbered(3 * index, 3)
        if len(specs) == 2:
            feeds["s"] = np.ones(1, np.float32)
        parts = split.divide(feeds)
        seen.append(bool(parts))
        assert all(part["x"].shape == (3, 2) for part in parts)
    assert seen == [True, True, True, False] * 2
    for batches in (split.held.batches(), split.kept.batches()):
        assert [batch["x"].shape for batch in batches] == [(3, 2)] * len(batches)
    assert len(split.held.batches()) == 2
    assert len(split.kept.batches()) == 6


def test_inputs_without_any_axis() -> None:
    specs = (TensorSpec("x", (), "float32"),)
    split = HoldOutSplit(specs, 1, 2)
    for _ in range(4):
        split.divide({"x": np.float32(2) * np.ones(())})
    assert [batch["x"].shape for batch in split.kept.batches()] == [(), ()]
