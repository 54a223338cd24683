"""The GPU as torch sees it, and as the driver's library does where torch has no CUDA."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from octavo.engines.tensorrt import cuda_driver
from octavo.engines.tensorrt.cuda_driver import Gpu, current_gpu, driver_version


class FakeLibrary:
    """libcuda with one device."""

    def __init__(self, start: int = 0, devices: int = 1, name: int = 0) -> None:
        self.start, self.devices, self.name = start, devices, name

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.start

    def cuDriverGetVersion(self, out: Any) -> int:  # noqa: N802
        out._obj.value = 12080
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:  # noqa: N802
        out._obj.value = index
        return 0 if index < self.devices else 101

    def cuDeviceGetName(self, out: Any, size: int, device: Any) -> int:  # noqa: N802
        out.value = b"NVIDIA L4"
        assert size == 256
        return self.name

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: Any) -> int:  # noqa: N802
        out._obj.value = {75: 8, 76: 9}[attribute]
        return 0


def use(monkeypatch: pytest.MonkeyPatch, library: FakeLibrary | None) -> None:
    def load(name: str) -> FakeLibrary:
        assert name == "libcuda.so.1"
        if library is None:
            raise OSError("cannot open shared object file")
        return library

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", load)


def test_the_driver_is_asked_where_torch_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeLibrary())
    assert current_gpu() == Gpu(0, "NVIDIA L4", "sm_89")
    assert driver_version() == "12.8"


@pytest.mark.parametrize(
    "library", [None, FakeLibrary(start=100), FakeLibrary(devices=0), FakeLibrary(name=1)]
)
def test_no_driver_or_no_device_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, library: FakeLibrary | None
) -> None:
    use(monkeypatch, library)
    assert current_gpu() is None


def test_no_driver_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)
    assert driver_version() == "none"


def test_torchs_current_device_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, index - 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert current_gpu() == Gpu(1, "GPU 1", "sm_120")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_both_ways_agree_on_a_real_gpu() -> None:
    driver = cuda_driver._driver()
    assert driver is not None
    with torch.cuda.device(0):
        assert cuda_driver._first_device(driver) == current_gpu()
