from __future__ import annotations

import time

import pytest

from octavo.core.errors import InputError
from octavo.measure import interleaved_latency


def test_percentiles_and_counts() -> None:
    found = interleaved_latency(
        {"slow": lambda: time.sleep(0.004), "fast": lambda: None}, rounds=4, calls_per_round=3
    )
    assert list(found) == ["slow", "fast"]
    for latency in found.values():
        assert latency.count == 12
        assert latency.p20 <= latency.p50 <= latency.p80
    assert 4 <= found["slow"].p20 < 20
    assert found["fast"].p50 < 1


def test_calls_are_made_in_turn_and_the_first_of_a_block_is_not_timed() -> None:
    order: list[str] = []
    interleaved_latency(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=2,
        calls_per_round=2,
        warmup=1,
    )
    assert "".join(order) == "ab" + "aaabbb" * 2


def test_the_device_is_waited_for_around_each_timed_call() -> None:
    waits: list[int] = []
    interleaved_latency(
        {"a": lambda: None}, rounds=2, calls_per_round=3, synchronize=lambda: waits.append(1)
    )
    assert len(waits) == 2 * 3 * 2


@pytest.mark.parametrize("options", [{"rounds": 0}, {"calls_per_round": 0}, {"warmup": -1}])
def test_nothing_to_time_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="nothing to time"):
        interleaved_latency({"a": lambda: None}, **options)
    with pytest.raises(InputError, match="0 callables"):
        interleaved_latency({})


def test_an_error_comes_through() -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        interleaved_latency({"a": broken})
