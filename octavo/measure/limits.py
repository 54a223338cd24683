"""What this device reaches in practice: the limits that a kernel's time is set against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from octavo.core.errors import first_line
from octavo.measure.kernels import kernel_times

__all__ = ["Limits", "measure_limits"]

GPU_COPY_BYTES = 1 << 30
GPU_SIZE = 8192
CPU_COPY_BYTES = 256 << 20
CPU_SIZE = 1024
RATES = ("int8", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Limits:
    """Practical limits of a device, measured.

    Attributes:
        copy_gbs: GB/s (10**9 bytes) that a large copy reads and writes together.
        tops: kind of product ("int8", "bfloat16", ...) -> 10**12 operations a second of a large
            square one.
        absent: kind of product -> why it was not measured.
    """

    copy_gbs: float
    tops: Mapping[str, float]
    absent: Mapping[str, str] = field(default_factory=dict)

    def floor_us(self, moved: int, operations: int, rate: str) -> float:
        """Microseconds below which a call cannot come: the larger of its two limits.

        Args:
            moved: bytes that it reads and writes.
            operations: multiplications and additions.
            rate: kind of product; one without a limit counts its bytes alone.
        """
        memory = moved / (self.copy_gbs * 1e3)
        known = operations > 0 and rate in self.tops
        return max(memory, operations / (self.tops[rate] * 1e6) if known else 0.0)

    def percent(self, moved: int, operations: int, rate: str, microseconds: float) -> float:
        """How much of the limit a call reaches; over 100 where caches serve what it reads."""
        return 100 * self.floor_us(moved, operations, rate) / microseconds


def measure_limits(
    device: torch.device,
    *,
    size: int | None = None,
    copy_bytes: int | None = None,
    seconds: float = 0.5,
) -> Limits:
    """Measures a large copy and a large square product of each kind, on random data.

    Args:
        device: a GPU or the CPU.
        size: of the products' three axes; by default 8192 on a GPU and 1024 elsewhere.
        copy_bytes: that the copy reads; by default 1 GiB on a GPU and 256 MiB elsewhere.
        seconds: about how long each measurement may take.
    """
    on_gpu = device.type == "cuda"
    length = size or (GPU_SIZE if on_gpu else CPU_SIZE)
    count = copy_bytes or (GPU_COPY_BYTES if on_gpu else CPU_COPY_BYTES)
    copy = _time(_copy(count, device), device, seconds)
    tops: dict[str, float] = {}
    absent: dict[str, str] = {}
    for rate in RATES:
        try:
            took = _time(_product(rate, length, device), device, seconds)
        except (RuntimeError, NotImplementedError) as error:
            absent[rate] = first_line(error)
            continue
        tops[rate] = 2 * length**3 / took / 1e6
    return Limits(2 * count / (copy * 1e3), tops, absent)


def _time(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    found = kernel_times({"it": call}, device, samples=20, seconds=seconds, rounds=2)
    return found["it"].p50


def _copy(count: int, device: torch.device) -> Callable[[], object]:
    source = torch.randint(-128, 128, (count,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(rate: str, size: int, device: torch.device) -> Callable[[], object]:
    random = torch.Generator(device).manual_seed(0)
    if rate == "int8":
        x, w = (
            torch.randint(
                -128, 128, (size, size), dtype=torch.int8, generator=random, device=device
            )
            for _ in range(2)
        )
        return lambda: torch._int_mm(x, w.T)
    dtype: torch.dtype = getattr(torch, rate)
    a, b = (torch.randn(size, size, generator=random, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b.T
