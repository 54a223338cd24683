"""The GPU that engines run on, and its driver: through torch, or without it through libcuda."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import torch

__all__ = ["Gpu", "current_gpu", "driver_version"]

LIBRARY = "libcuda.so.1"
CAPABILITY: Final = (75, 76)
"""cuDeviceGetAttribute's numbers for the major and minor part of the compute capability."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: its number among the visible devices.
        name: its model.
        architecture: its compute capability as "sm_86".
    """

    index: int
    name: str
    architecture: str


def current_gpu() -> Gpu | None:
    """The current device of torch; where torch has no CUDA, the driver's first; None without."""
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        major, minor = torch.cuda.get_device_capability(index)
        return Gpu(index, torch.cuda.get_device_name(index), f"sm_{major}{minor}")
    driver = _driver()
    return None if driver is None else _first_device(driver)


def driver_version() -> str:
    """The newest CUDA that the driver runs ("13.0"), or "none"."""
    driver = _driver()
    number = ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return "none"
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _driver() -> ctypes.CDLL | None:
    """The driver's library, where there is one and it finds a device."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _first_device(driver: ctypes.CDLL) -> Gpu | None:
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    values = [ctypes.c_int(0), ctypes.c_int(0)]
    results = [
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
    ]
    for value, attribute in zip(values, CAPABILITY, strict=True):
        results.append(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
    if any(results):
        return None
    return Gpu(0, name.value.decode(errors="replace"), f"sm_{values[0].value}{values[1].value}")
