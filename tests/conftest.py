"""Lets every test folder import the modules beside this file, and shares what is slow to make."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which any test may do first
    os.environ["TRITON_INTERPRET"] = "1"
from filelock import FileLock
from lite0 import Lite0

from octavo.calibration import CalibrationTable
from octavo.demo import images
from octavo.export import TorchExport, export_torch, load_onnx, save_onnx
from octavo.kernels.dispatch.operator import forget_plans
from octavo.kernels.native import library as native

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no worker waits for one at the end.

    Coverage does not watch them: it would make them half as long again, and counts what is tested
    by itself, in the quick tests.
    """
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.no_cover)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Lets the garbage collector pass over what is imported, and come less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    """What an operator has chosen in one test is not known in the next."""
    forget_plans()


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that the C of our operators does not know."""
    monkeypatch.setattr(native.Library, "reason", lambda _: "a test")
    forget_plans()


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[int]]:
    """Gives a list that grows with every call of a module's function."""

    def count(module: Any, name: str) -> list[int]:
        made: list[int] = []
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: made.append(1) or run(*given))
        return made

    return count


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes a folder once for all workers of a test run: once(name, make) -> folder."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not (folder / "done").exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                (folder / "done").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def lite0(once: Once) -> Lite0:
    """The real network; exported once for all workers."""
    module = images.efficientnet_lite0()

    def make(folder: Path) -> None:
        exported = export_torch(module, torch.zeros(1, 3, images.SIZE, images.SIZE))
        save_onnx(exported.model, folder / "lite0.onnx")
        torch.export.save(exported.program, folder / "lite0.pt2")
        np.save(folder / "cal.npy", images.crops(images.CALIBRATION_PHOTOS, 48, seed=0))
        np.save(folder / "ev.npy", images.crops(images.EVALUATION_PHOTOS, 32, seed=1))

    folder = once("lite0", make)
    program = torch.export.load(folder / "lite0.pt2")
    exported = TorchExport(load_onnx(folder / "lite0.onnx"), program)
    return Lite0(
        module,
        exported,
        folder / "lite0.onnx",
        np.load(folder / "cal.npy"),
        np.load(folder / "ev.npy"),
    )


@pytest.fixture(scope="session")
def demo_folder(once: Once) -> Path:
    """What `octavo demo` makes, with fewer crops and rounds; run once, as users do it."""
    call = "run_demo(sys.argv[1], calibration_crops=48, evaluation_crops=40, rounds=6)"
    code = f"import sys; from octavo.demo.run import run_demo; {call}"

    def make(folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, str(folder)]
        subprocess.run(command, env=environment, check=True, capture_output=True)

    return once("demo", make)


@pytest.fixture(scope="session")
def lite0_table(demo_folder: Path) -> CalibrationTable:
    """The table that the demo's calibration found."""
    return CalibrationTable.load(demo_folder / "table.json")


@pytest.fixture
def without_gradients() -> Iterator[None]:
    """For files whose every test only computes; they name it in `pytestmark`."""
    with torch.no_grad():
        yield
