"""Latency of several callables side by side, on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from octavo.core.errors import InputError
from octavo.core.progress import NoProgress, Progress
from octavo.core.results import LatencyMs

__all__ = ["interleaved_latency", "summarize"]


def interleaved_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    calls_per_round: int = 5,
    warmup: int = 3,
    synchronize: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, LatencyMs]:
    """Times callables in turn, so that a machine that slows down slows all of them down.

    Each round gives every callable a block of calls, the first of which is not timed: it wakes up
    threads that slept while the others ran.

    Args:
        calls: name -> what to time.
        rounds: how often each gets a block.
        calls_per_round: timed calls in a block.
        warmup: calls of each before the first round, not timed.
        synchronize: waits for the device to finish; called before and after each timed call.
        progress: shows one step per round.

    Returns:
        name -> 20th, 50th and 80th percentile of one call, in milliseconds.

    Raises:
        InputError: nothing to time, or counts below one.
    """
    if not calls or min(rounds, calls_per_round) < 1 or warmup < 0:
        raise InputError(
            f"nothing to time: {len(calls)} callables, {rounds} rounds of {calls_per_round} calls"
        )
    wait = synchronize or (lambda: None)
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with (progress or NoProgress()).task("Measuring latency", rounds) as advance:
        for _ in range(rounds):
            for name, call in calls.items():
                call()
                for _ in range(calls_per_round):
                    wait()
                    start = time.perf_counter()
                    call()
                    wait()
                    seconds[name].append(time.perf_counter() - start)
            advance(1)
    return {name: summarize(values) for name, values in seconds.items()}


def summarize(seconds: list[float]) -> LatencyMs:
    """20th, 50th and 80th percentile of calls, in milliseconds."""
    p20, p50, p80 = np.percentile(seconds, [20, 50, 80]) * 1e3
    return LatencyMs(float(p20), float(p50), float(p80), len(seconds))
