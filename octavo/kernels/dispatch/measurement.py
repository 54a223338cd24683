"""Measuring candidates on the user's GPU: when that is possible, and who may win."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from octavo.core.errors import OctavoError
from octavo.measure.kernels import kernel_times

__all__ = ["exclusive", "measurement_reason", "time_candidates"]

FINALISTS = 6
"""Candidates that are measured once more, with more samples."""
DISAGREEMENT = 0.05
"""Relative error norm beyond which a candidate's result is wrong, whatever the type."""
MOST_COMPARED = 1 << 22
"""Values of a result that are compared; of larger ones every second, third, ... is."""

_measuring = threading.RLock()
_busy: set[str] = set()


def measurement_reason(device: torch.device) -> str:
    """Why nothing can be measured now, or nothing."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if os.environ.get("OCTAVO_TUNE") == "0":
        return "OCTAVO_TUNE=0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton interprets its kernels"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return ""


@contextmanager
def exclusive(name: str) -> Iterator[bool]:
    """One thread measures at a time; False inside a measurement of the same name."""
    with _measuring:
        if name in _busy:
            yield False
            return
        _busy.add(name)
        try:
            yield True
        finally:
            _busy.discard(name)


def time_candidates(
    title: str, calls: Mapping[str, Callable[[], object]], device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Median microseconds of each call that works, with a cold L2 cache, and why others do not.

    Every call first has to run and to agree with the first that does; the fastest are measured
    once more, in turn. What a call returns must be new memory.

    Args:
        title: for the message, when all fail.
        calls: name -> what to time; the first sets the result that the others must give.
        device: where they run.

    Returns:
        name -> microseconds, fewest first; name -> what went wrong.

    Raises:
        OctavoError: all fail, or one breaks the device.
    """
    failures: dict[str, str] = {}
    working: dict[str, Callable[[], object]] = {}
    expected: object = None
    for name, call in calls.items():
        try:
            result = call()
            _synchronize(device)
        except Exception as error:  # whatever a compiler or a driver raises is kept
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            _still_alive(title, name, device, error)
            continue
        if not working:
            expected = result
        else:
            same = _agree(result, expected)
            _poison(result)  # or the next one, given this memory, would seem to have written it
            if not same:
                failures[name] = "its result differs from the first candidate's"
                continue
        working[name] = call
    if not working:
        raise OctavoError(f"no candidate for {title} runs: {failures}")
    del expected
    times = _medians(working, device, 8)
    if len(times) > 1:
        close = sorted(times, key=lambda name: times[name])[:FINALISTS]
        times.update(_medians({name: working[name] for name in close}, device, 40))
    return dict(sorted(times.items(), key=lambda item: item[1])), failures


def _medians(
    calls: Mapping[str, Callable[[], object]], device: torch.device, samples: int
) -> dict[str, float]:
    found = kernel_times(calls, device, cold=True, graph=False, samples=samples, seconds=0.2)
    return {name: value.p50 for name, value in found.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _still_alive(title: str, name: str, device: torch.device, cause: Exception) -> None:
    try:
        _synchronize(device)
    except RuntimeError as error:
        raise OctavoError(
            f"candidate {name} for {title} broke the device: {cause}; nothing more runs in this "
            "process. Start again with OCTAVO_TUNE=0 and report this"
        ) from error


def _poison(result: object) -> None:
    """Overwrites what a candidate returned."""
    if isinstance(result, torch.Tensor):
        result.fill_(float("nan") if result.is_floating_point() else 85)
    elif isinstance(result, (tuple, list)):
        for one in result:
            _poison(one)


def _agree(result: object, expected: object) -> bool:
    """Whether two results are the same but for rounding; other things than tensors always are."""
    if isinstance(result, (tuple, list)) and isinstance(expected, (tuple, list)):
        pairs = zip(result, expected, strict=False)
        return len(result) == len(expected) and all(_agree(one, two) for one, two in pairs)
    if not isinstance(result, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return True
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    step = max(1, result.numel() // MOST_COMPARED)
    found, wanted = (
        torch.nan_to_num(value.reshape(-1)[::step].float(), 0.0, 0.0, 0.0)
        for value in (result, expected)
    )
    return bool((found - wanted).norm() <= DISAGREEMENT * wanted.norm())
