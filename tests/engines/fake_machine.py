"""A machine with a GPU and TensorRT, put in place of this one for a test."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from fake_cuda import FakeCuda, FakeDriver
from fake_tensorrt import World, make_module

from octavo.engines.tensorrt import backend, base, cuda_driver, rtx, torch_runner
from octavo.engines.tensorrt.api import TensorRTApi, find_api
from octavo.engines.tensorrt.cuda_driver import Gpu

TENSORRT_10 = "10.13.3.9"
TENSORRT_11 = "11.4.1.2"
RTX = "1.7.1.116"
GPU = Gpu(1, "NVIDIA RTX A5000", "sm_86")


@dataclass
class Machine:
    """What a test looks at: the calls that arrived, torch.cuda and pycuda.driver."""

    world: World
    cuda: FakeCuda
    driver: FakeDriver
    monkeypatch: pytest.MonkeyPatch

    def has(self, gpu: Gpu | None) -> None:
        """Puts another GPU into the machine, or takes it out."""
        for module in (backend, base, rtx):
            self.monkeypatch.setattr(module, "current_gpu", lambda: gpu)

    def install(self, version: str) -> TensorRTApi:
        """Installs another version."""
        for_rtx = version.startswith("1.")
        name = "tensorrt_rtx" if for_rtx else "tensorrt"
        self.monkeypatch.setitem(sys.modules, name, make_module(version, self.world))
        return find_api("tensorrt-rtx" if for_rtx else "tensorrt")


def make_machine(monkeypatch: pytest.MonkeyPatch, version: str) -> Machine:
    world = World()
    machine = Machine(world, FakeCuda(world), FakeDriver(world), monkeypatch)
    machine.install(version)
    machine.has(GPU)
    monkeypatch.setattr(cuda_driver, "driver_version", lambda: "13.0")
    monkeypatch.setattr(backend, "driver_version", lambda: "13.0")
    monkeypatch.setattr(torch_runner, "cuda", machine.cuda)
    monkeypatch.setattr(torch_runner, "_gpu", lambda _index: torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", machine.driver)
    return machine
