"""Measuring: latency of models in turn, times of single calls, and the limits of a device.

What needs torch is loaded when it is first used, so that processes which time other engines do
without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from octavo.measure.isolated import isolated_latency
from octavo.measure.timing import interleaved_latency

if TYPE_CHECKING:
    from octavo.measure.kernels import KernelTime, kernel_times
    from octavo.measure.limits import Limits, measure_limits

__all__ = [
    "KernelTime",
    "Limits",
    "interleaved_latency",
    "isolated_latency",
    "kernel_times",
    "measure_limits",
]

_HOME = {
    "KernelTime": "octavo.measure.kernels",
    "Limits": "octavo.measure.limits",
    "kernel_times": "octavo.measure.kernels",
    "measure_limits": "octavo.measure.limits",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'octavo.measure' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
