"""`import octavo` is cheap and touches neither a GPU nor a heavy package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import octavo

HEAVY = {"triton", "tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "pycuda", "matplotlib"}
SECONDS = 0.3

PROGRAM = """
import json, os, sys, time
import torch

def seconds():
    # A forked child imports afresh with torch already there.
    reader, writer = os.pipe()
    if os.fork() == 0:
        start = time.perf_counter()
        import octavo
        os.write(writer, str(time.perf_counter() - start).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    return float(os.read(reader, 64))

times = [seconds() for _ in range(3)]
before = set(sys.modules)
import octavo
imported = sorted(set(sys.modules) - before)
import octavo.kernels, octavo.layers
print(json.dumps({
    "times": times,
    "imported": imported,
    "compiler": "torch._dynamo" in sys.modules,
    "cuda": torch.cuda.is_initialized(),
}))
"""


@pytest.fixture(scope="module")
def fresh() -> dict:
    """What a new interpreter saw when it imported octavo after torch."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(octavo.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_heavy_packages_are_not_imported(fresh: dict) -> None:
    assert "octavo" in fresh["imported"]
    heavy = [name for name in fresh["imported"] if name.split(".")[0] in HEAVY]
    assert not heavy, f"`import octavo` imports {heavy}"


def test_operators_and_layers_do_not_import_the_compiler(fresh: dict) -> None:
    assert fresh["compiler"] is False, "torch._dynamo takes over a second to import"


def test_cuda_is_not_initialised(fresh: dict) -> None:
    assert fresh["cuda"] is False


def test_it_is_quick_after_torch(fresh: dict) -> None:
    best = min(fresh["times"])
    assert best < SECONDS, f"`import octavo` takes {best:.2f} s after torch, {SECONDS} allowed"
