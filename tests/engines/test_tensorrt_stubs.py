"""mypy holds our calls of TensorRT against the published stubs of 10.13.

The stubs do not parse as they are: a few methods have parameters called `in`. A copy without what
does not parse, none of which we call, is given to mypy. Elsewhere mypy leaves the stubs alone, so
this is where calls are checked.
"""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.engines import tensorrt

CONFIG = """
[mypy]
check_untyped_defs = true
follow_imports = skip

[mypy-tensorrt.*,tensorrt_bindings.*]
follow_imports = normal
ignore_errors = true
"""
"""Only our calls and the stubs are read: what we import from elsewhere stands for anything."""

KNOWN = (
    '"Dims"; expected "Iterable',  # Dims is a sequence, which its stub leaves out,
    "Need type annotation for",  # so what is made of one has no type
)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        files = importlib.metadata.files("tensorrt-stubs") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tensorrt-stubs is not installed")
    folder = tmp_path_factory.mktemp("stubs")
    for file in files:
        if file.suffix == ".pyi" and file.parts[0] in ("tensorrt", "tensorrt_bindings"):
            target = folder.joinpath(*file.parts)
            target.parent.mkdir(exist_ok=True)
            target.write_text(_parsing(file.locate().read_text()))
    (folder / "tensorrt_libs.pyi").touch()
    return folder


def _parsing(text: str) -> str:
    """The text without the lines that no Python parser takes."""
    lines = text.splitlines()
    for _ in range(20):
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            lines[(error.lineno or 1) - 1] = ""
        else:
            return "\n".join(lines) + "\n"
    raise AssertionError("the stubs have changed beyond repair")


@pytest.fixture(scope="module")
def complaints(stubs: Path) -> Callable[[Path], list[str]]:
    """What mypy says of a folder whose calls of TensorRT it holds against the stubs."""
    (stubs / "mypy.ini").write_text(CONFIG)

    def run(folder: Path) -> list[str]:
        command = [sys.executable, "-m", "mypy", "--config-file", str(stubs / "mypy.ini")]
        done = subprocess.run(
            [*command, "--cache-dir", str(stubs / "cache"), str(folder)],
            env={"MYPYPATH": str(stubs), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        return [line for line in done.stdout.splitlines() if ": error: " in line]

    return run


def test_our_calls_of_tensorrt_10_fit_its_stubs(complaints: Callable[[Path], list[str]]) -> None:
    found = complaints(Path(tensorrt.__file__).parent)
    wrong = [line for line in found if not any(known in line for known in KNOWN)]
    assert not wrong, "\n".join(wrong)
    assert len(found) > len(wrong), "mypy saw the stubs"


WRONG = """
from __future__ import annotations
import tensorrt as trt

def calls(builder: trt.Builder, context: trt.IExecutionContext) -> None:
    builder.create_networks(0)
    context.set_input_shape(3, (1, 2))
    context.execute_async_v3()
"""


def test_calls_that_do_not_fit_are_seen(
    complaints: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "calls.py").write_text(WRONG)
    kinds = [line.rpartition("[")[2] for line in complaints(tmp_path)]
    assert kinds == ["attr-defined]", "call-overload]", "call-arg]"]
