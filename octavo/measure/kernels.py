"""Time of single calls in microseconds: on a GPU its own time, with a cold or a warm L2 cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from octavo.core.errors import InputError, first_line

__all__ = ["KernelTime", "kernel_times"]

GRAPH_US = 200.0
"""A graph of warm calls repeats them until it takes about this long."""
SLEEP_CYCLES = 400_000
"""How long the GPU sleeps before a timed call, so that the processor can queue all of it."""
CPU_FLUSH_BYTES = 64 << 20
LEAST_FLUSH_BYTES = 8 << 20


@dataclass(frozen=True)
class KernelTime:
    """Percentiles of one call.

    Attributes:
        p20: microseconds; a fifth of the samples are below.
        p50: the median.
        p80: a fifth of the samples are above.
        count: samples.
        method: "CUDA graph", "CUDA events" (with the reason, where a graph was wanted) or "wall
            clock".
    """

    p20: float
    p50: float
    p80: float
    count: int
    method: str


@dataclass(frozen=True)
class _Sampler:
    sample: Callable[[], float]  # microseconds of one call
    method: str


def kernel_times(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    cold: bool = False,
    graph: bool = True,
    samples: int = 50,
    seconds: float = 0.5,
    rounds: int = 5,
) -> dict[str, KernelTime]:
    """Times calls in turn, so that a device that slows down slows all of them down.

    On a GPU a call is captured in a CUDA graph, so that what the processor needs to launch it does
    not count; one that cannot be captured is timed with events, and `method` says so. On a CPU the
    wall clock is read.

    Args:
        calls: name -> what to time.
        device: where they run.
        cold: overwrite the L2 cache (on a CPU 64 MiB) before each sample. Weights are cold in a
            real network; a warm figure shows what a kernel can do without memory.
        graph: capture CUDA graphs; False inside a user's program, where that could disturb.
        samples: wanted of each call.
        seconds: about how long each call may take altogether; a slow one gets fewer samples.
        rounds: each call gets its samples in so many blocks.

    Returns:
        name -> percentiles.

    Raises:
        InputError: nothing to time.
    """
    if not calls or samples < 1 or rounds < 1:
        raise InputError(f"nothing to time: {len(calls)} calls, {samples} samples")
    flush = _flusher(device) if cold else None
    with _current(device):
        samplers = {
            name: _sampler(call, device, flush, graph and device.type == "cuda")
            for name, call in calls.items()
        }
        blocks: dict[str, int] = {}
        for name, sampler in samplers.items():
            start = time.perf_counter()
            sampler.sample()
            took = time.perf_counter() - start
            fitting = int(min(samples, seconds / max(took, 1e-9)))
            blocks[name] = max(1, -(-fitting // rounds))
        found: dict[str, list[float]] = {name: [] for name in samplers}
        for _ in range(rounds):
            for name, sampler in samplers.items():
                sampler.sample()  # wakes threads and clocks up; not counted
                found[name] += [sampler.sample() for _ in range(blocks[name])]
    return {name: _summary(found[name], samplers[name].method) for name in samplers}


def _summary(microseconds: list[float], method: str) -> KernelTime:
    p20, p50, p80 = np.percentile(microseconds, [20, 50, 80])
    return KernelTime(float(p20), float(p50), float(p80), len(microseconds), method)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _flusher(device: torch.device) -> Callable[[], object]:
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        size = max(4 * cache, 128 << 20)
    else:
        size = CPU_FLUSH_BYTES
    return _buffer(size, device).zero_


def _buffer(size: int, device: torch.device) -> torch.Tensor:
    """Bytes; on a full device half of them, and so on: a smaller buffer overwrites less."""
    try:
        return torch.empty(size, dtype=torch.int8, device=device)
    except torch.OutOfMemoryError:
        if size <= LEAST_FLUSH_BYTES:
            raise
    return _buffer(size // 2, device)


def _sampler(
    call: Callable[[], object],
    device: torch.device,
    flush: Callable[[], object] | None,
    graph: bool,
) -> _Sampler:
    for _ in range(2):
        call()
    if device.type != "cuda":
        return _Sampler(_wall_clock(call, flush), "wall clock")
    torch.cuda.synchronize(device)
    if not graph:
        return _Sampler(_events(call, flush), "CUDA events")
    once = _captured(call, 1)
    if isinstance(once, str):
        return _Sampler(_events(call, flush), f"CUDA events; {once}")
    if flush is not None:
        return _Sampler(_events(once.replay, flush), "CUDA graph")
    repeat = max(1, min(1000, int(GRAPH_US / max(_events(once.replay, None)(), 0.1))))
    many = once if repeat == 1 else _captured(call, repeat)
    if isinstance(many, str):
        return _Sampler(_events(once.replay, None), "CUDA graph")
    return _Sampler(_events(many.replay, None, repeat), "CUDA graph")


def _wall_clock(
    call: Callable[[], object], flush: Callable[[], object] | None
) -> Callable[[], float]:
    def sample() -> float:
        if flush is not None:
            flush()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    return sample


def _events(
    call: Callable[[], object], flush: Callable[[], object] | None, repeat: int = 1
) -> Callable[[], float]:
    event: Callable[..., Any] = torch.cuda.Event  # which torch leaves untyped
    start, end = event(enable_timing=True), event(enable_timing=True)

    def sample() -> float:
        if flush is not None:
            flush()
        else:
            call()
        _sleep()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / repeat

    return sample


def _sleep() -> None:
    """Keeps the GPU busy while the processor queues the call, so that its gaps do not count."""
    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(SLEEP_CYCLES)


def _captured(call: Callable[[], object], repeat: int) -> torch.cuda.CUDAGraph | str:
    """A graph of so many calls, or why they cannot be captured: one that waits cannot."""
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured):
            for _ in range(repeat):
                call()
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises when more than the capture is broken
        return f"cannot be captured: {first_line(error)}"
    return captured
