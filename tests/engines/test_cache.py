from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_models import cnn, cnn_table, fake_artifact, images

import octavo
from octavo.calibration import CalibrationTable
from octavo.core.errors import BuildError, OctavoWarning
from octavo.engines import Artifact, Engine, cache, read_artifact
from octavo.engines.cache import cache_key, cached
from octavo.engines.onnxruntime import OnnxRuntimeBackend


def never() -> Artifact:
    raise AssertionError("it is in the cache and need not be built")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes the precision of every engine that is really built."""
    builds: list[str] = []
    real = OnnxRuntimeBackend.build

    def build(self: OnnxRuntimeBackend, request: Any) -> Artifact:
        builds.append(request.precision)
        return real(self, request)

    monkeypatch.setattr(OnnxRuntimeBackend, "build", build)
    return builds


def test_an_engine_is_built_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    assert cached(folder, "k", fake_artifact) == (fake_artifact(), False)
    assert cached(str(folder), "k", never) == (fake_artifact(), True)
    assert read_artifact(folder / "k.octavo") == fake_artifact()
    other = fake_artifact(precision="float32")
    assert cached(folder, "other", lambda: other) == (other, False)
    assert cached(folder, "k", never) == (fake_artifact(), True)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:100], lambda data: data[:200] + b"!" + data[201:], lambda data: b""],
    ids=["truncated", "changed", "empty"],
)
def test_a_damaged_engine_is_reported_and_built_again(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    cached(tmp_path, "k", fake_artifact)
    path = tmp_path / "k.octavo"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(OctavoWarning, match=r"rebuilding a cached engine: .*k\.octavo"):
        assert cached(tmp_path, "k", fake_artifact) == (fake_artifact(), False)
    assert cached(tmp_path, "k", never) == (fake_artifact(), True)


def test_a_build_that_fails_leaves_nothing_and_the_lock_free(tmp_path: Path) -> None:
    def fail() -> Artifact:
        raise BuildError("no")

    for _ in range(2):
        with pytest.raises(BuildError):
            cached(tmp_path, "k", fail)
    assert not (tmp_path / "k.octavo").exists()
    assert cached(tmp_path, "k", fake_artifact)[1] is False


def test_keys_depend_on_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"model": "m", "precision": "int8", "profiles": {"x": ((1, 3), (2, 3))}, "targets": []}
    key = cache_key(parts)
    assert key == cache_key(dict(reversed(parts.items()))), "the order does not matter"
    assert len(key) == 64
    assert int(key, 16)
    changed = [{**parts, name: "other"} for name in parts]
    keys = {key, *map(cache_key, changed), cache_key({**parts, "more": None})}
    monkeypatch.setattr(cache, "__version__", "99.0")
    keys.add(cache_key(parts))
    assert len(keys) == len(changed) + 3


def build(folder: Path, model: onnx.ModelProto | None = None, **arguments: Any) -> Engine:
    given = {"precision": "float32", **arguments}
    return octavo.build(model or cnn(), cache_dir=folder, verbose=False, **given)


def test_the_same_request_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = counted(monkeypatch)
    x = images(3)
    for calibration, precision in ((None, "float32"), (cnn_table(), "int8")):
        fresh, again = (
            build(tmp_path, precision=precision, calibration=calibration) for _ in range(2)
        )
        assert builds.pop() == precision
        assert not builds
        assert again.artifact == fresh.artifact
        np.testing.assert_array_equal(fresh(x), again(x))


def test_requests_that_differ_are_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wider(table: CalibrationTable) -> CalibrationTable:
        entry = table.tensors["x"].model_copy(update={"scale": table.tensors["x"].scale * 2})
        return table.model_copy(update={"tensors": {**table.tensors, "x": entry}})

    builds = counted(monkeypatch)
    shapes = [[1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8]]
    requests: list[dict[str, Any]] = [
        {},
        {"model": cnn(seed=1)},
        {"precision": "float16", "example_inputs": images(2)},
        {"profiles": {"x": shapes}},
        {"profiles": {"x": [*shapes[:2], [8, 3, 8, 8]]}},
        {"precision": "int8", "calibration": cnn_table()},
        {"precision": "int8", "calibration": wider(cnn_table())},
    ]
    for request in itertools.chain(requests, requests):
        build(tmp_path, **request)
    assert len(builds) == len(requests)
    assert len(list(tmp_path.glob("*.octavo"))) == len(requests)


BUILDER = """
import sys, time
from pathlib import Path
import numpy as np
sys.path[:0] = [{tests!r}]
import octavo
from octavo.engines.onnxruntime import OnnxRuntimeBackend
from tiny_models import cnn

folder, me = Path({folder!r}), sys.argv[1]
real = OnnxRuntimeBackend.build

def build(self, request):
    (folder / f"built-by-{{me}}").touch()
    time.sleep(0.5)
    return real(self, request)

OnnxRuntimeBackend.build = build
(folder / f"ready-{{me}}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
engine = octavo.build(cnn(), precision="float32", cache_dir=folder / "cache", verbose=False)
np.save(folder / f"result-{{me}}.npy", engine(np.ones((2, 3, 8, 8), np.float32)))
"""


def test_two_processes_build_one_engine_between_them(tmp_path: Path) -> None:
    script = BUILDER.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    processes = [
        subprocess.Popen([sys.executable, "-c", script, name], stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"ready-{name}").exists() for name in "ab"):
        assert time.monotonic() < deadline, "a process did not start"
        assert all(process.poll() is None for process in processes), "a process failed early"
        time.sleep(0.01)
    (tmp_path / "go").touch()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    assert len(list(tmp_path.glob("built-by-*"))) == 1
    (path,) = (tmp_path / "cache").glob("*.octavo")
    with octavo.load(path) as engine:
        expected = engine(np.ones((2, 3, 8, 8), np.float32))
    for name in "ab":
        np.testing.assert_array_equal(np.load(tmp_path / f"result-{name}.npy"), expected)
