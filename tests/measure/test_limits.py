"""Practical limits, and times of single calls."""

from __future__ import annotations

import time

import pytest
import torch

from octavo.core.errors import InputError
from octavo.measure import kernels
from octavo.measure.kernels import kernel_times
from octavo.measure.limits import Limits, measure_limits

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def test_limits_of_this_device() -> None:
    found = measure_limits(CPU, size=64, copy_bytes=1 << 20, seconds=0.02)
    assert found.copy_gbs > 0
    assert set(found.tops) | set(found.absent) == {"int8", "bfloat16", "float16", "float32"}
    assert all(value > 0 for value in found.tops.values())


def test_what_cannot_be_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise RuntimeError("_int_mm needs a newer GPU\nand more")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    found = measure_limits(CPU, size=16, copy_bytes=1 << 10, seconds=0.001)
    assert found.absent == {"int8": "_int_mm needs a newer GPU"}
    assert "float32" in found.tops


def test_the_larger_of_both_limits_counts() -> None:
    limits = Limits(copy_gbs=100.0, tops={"int8": 2.0})
    # 10**6 bytes at 100 GB/s take 10 us; 4 * 10**7 operations at 2 TOPS take 20 us
    assert limits.floor_us(10**6, 0, "int8") == pytest.approx(10.0)
    assert limits.floor_us(10**6, 4 * 10**7, "int8") == pytest.approx(20.0)
    assert limits.floor_us(10**6, 4 * 10**7, "float8") == pytest.approx(10.0)
    assert limits.percent(10**6, 4 * 10**7, "int8", 40.0) == pytest.approx(50.0)


def test_percentiles_in_microseconds() -> None:
    found = kernel_times(
        {"slow": lambda: time.sleep(0.002), "quick": lambda: None}, CPU, samples=10, seconds=0.2
    )
    assert list(found) == ["slow", "quick"]
    slow = found["slow"]
    assert slow.p20 <= slow.p50 <= slow.p80
    assert 2000 <= slow.p20 < 20000
    assert slow.count == 10
    assert slow.method == "wall clock"
    assert found["quick"].p50 < 1000


def test_slow_calls_get_fewer_samples_and_all_take_turns() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("s")
        time.sleep(0.01)

    calls = {"slow": slow, "quick": lambda: order.append("q")}
    found = kernel_times(calls, CPU, samples=8, seconds=0.02, rounds=2)
    assert found["slow"].count == 2
    assert found["quick"].count == 8
    assert "".join(order) == "ss" + "qq" + "s" + "q" + ("ss" + "qqqqq") * 2


def test_a_cold_call_comes_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(kernels, "_flusher", lambda _device: lambda: order.append("f"))
    kernel_times({"a": lambda: order.append("a")}, CPU, cold=True, samples=1, rounds=1)
    assert "".join(order) == "aa" + "fa" * 3


def test_a_full_device_gets_a_smaller_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    empty = torch.empty
    most = 20 << 20

    def limited(size: int, **options: object) -> torch.Tensor:
        sizes.append(size)
        if size > most:
            raise torch.OutOfMemoryError("full")
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", limited)
    kernels._flusher(CPU)()
    assert sizes == [64 << 20, 32 << 20, 16 << 20]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        kernels._flusher(CPU)


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to time: 0 calls, 50 samples"):
        kernel_times({}, CPU)
    with pytest.raises(InputError, match="nothing to time: 1 calls, 0 samples"):
        kernel_times({"a": lambda: None}, CPU, samples=0)


def test_an_error_comes_through() -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        kernel_times({"a": broken}, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cold", [False, True])
def test_a_gpu_is_timed_by_graphs_and_else_by_events(cold: bool) -> None:
    x = torch.randn(1 << 22, device=DEVICE)
    calls = {"plain": lambda: x * 2, "waits": lambda: (x * 2).sum().item()}
    found = kernel_times(calls, DEVICE, cold=cold, samples=10)
    assert found["plain"].method == "CUDA graph"
    assert found["waits"].method.startswith("CUDA events; cannot be captured")
    assert 1 < found["plain"].p50 < 1000
