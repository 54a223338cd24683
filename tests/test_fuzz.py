"""Damaged files of every kind: the loaders refuse them with one error, or read the same content.

Over 6,000 inputs a run, the same ones each time; FUZZ_EXAMPLES=100 tries a hundred times
as many, new ones each time.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import cnn_artifact, cnn_table, fake_artifact, gated, tokens, two

from octavo.calibration import CalibrationTable
from octavo.core.errors import ArtifactError, ExportError
from octavo.engines import read_artifact, write_artifact
from octavo.export import load_onnx

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("FUZZ_EXAMPLES", "1"))


MODELS = [make().SerializeToString() for make in (gated, two, tokens)]


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def mutate(data: bytes, change: tuple[str, float, float, bytes]) -> bytes:
    """One change: `start` and `length` are shares of the whole, so that they fit any data."""
    kind, share, length, other = change
    start = int(share * len(data))
    stop = min(len(data), start + max(1, int(length * length * 64)))
    if kind == "flip" and start < len(data):
        return data[:start] + bytes([data[start] ^ (1 << (other[0] & 7))]) + data[start + 1 :]
    if kind == "cut":
        return data[:start]
    if kind == "delete":
        return data[:start] + data[stop:]
    if kind == "insert":
        return data[:start] + other + data[start:]
    if kind == "repeat":
        return data[:stop] + data[start:]
    return data[:start] + other + data[start + len(other) :]


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "cut", "delete", "insert", "repeat", "overwrite"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=16),
    ),
    min_size=1,
    max_size=4,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e39, -1e39, 1e-60, 5e-324])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["int8", "uint8", "float32", "x", "", "../x", "\0", "a\nb", "é" * 200]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
"""Any JSON value, infinities and NaN included, as Python writes and reads them."""


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found = []
    stack = [value]
    while stack:
        container = stack.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                stack.append(container[key])
    return found


def edit(document: Any, place: int, action: str, value: Any) -> Any:
    """A copy of a JSON document in which one place was changed."""
    copy = json.loads(json.dumps(document))
    spots = places(copy)
    container, key = spots[place % len(spots)]
    if action == "delete":
        del container[key]
    elif action == "add" and isinstance(container, dict):
        container[str(value)[:20]] = value
    elif action == "add":
        container.insert(key, value)
    else:
        container[key] = value
    return copy


EDIT = {
    "place": st.integers(0, 1 << 16),
    "action": st.sampled_from(["replace", "replace", "replace", "delete", "add"]),
    "value": JSON,
}


def check_message(refusal: ArtifactError, name: str) -> None:
    """It names the file, and does not print a screenful of damaged bytes."""
    assert name in str(refusal)
    assert len(str(refusal)) < 700 + len(name)


def check_table(data: bytes) -> None:
    """Loads a table: refused, or usable and the same after saving."""
    try:
        table = CalibrationTable.loads(data, "t.json")
    except ArtifactError as refusal:
        check_message(refusal, "t.json")
        return
    for entry in (*table.tensors.values(), *table.weights.values()):
        assert (entry.qparams.scale > 0).all()
    table.histograms(table.tensors)
    assert set(table.spec(table.tensors).activations) == set(table.tensors)
    again = CalibrationTable.loads(table.dumps().encode())
    assert again.dumps() == table.dumps()


@pytest.fixture(scope="module")
def table_text() -> bytes:
    return cnn_table().dumps().encode()


@pytest.fixture(scope="module")
def small_table() -> dict[str, Any]:
    """Without histograms, whose 256 numbers would be most of the places to change."""
    document = json.loads(cnn_table().dumps())
    for entry in document["tensors"].values():
        entry["histogram"] = None
    document["bias_correction"] = {"c0": [0.5] * 8}
    document["equalization"] = {"r0": [1.0] * 8}
    return dict(document)


@pytest.fixture(scope="module")
def engine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "net.octavo"


@fuzz(500)
@given(changes=CHANGES)
def test_tables_with_changed_bytes(table_text: bytes, changes: Any) -> None:
    data = table_text
    for change in changes:
        data = mutate(data, change)
    check_table(data)


@fuzz(700)
@given(**EDIT)
def test_tables_with_changed_values(
    small_table: dict[str, Any], place: int, action: str, value: Any
) -> None:
    check_table(json.dumps(edit(small_table, place, action, value)).encode())


@fuzz(300)
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_tables_of_anything(data: bytes) -> None:
    check_table(data)


def read(path: Path, data: bytes) -> Any:
    """Reads an engine file of these bytes; None where it is refused."""
    path.write_bytes(data)
    try:
        return read_artifact(path)
    except ArtifactError as refusal:
        check_message(refusal, str(path))
        return None


@fuzz(600)
@given(real=st.booleans(), changes=CHANGES)
def test_engine_files_with_changed_bytes(engine_file: Path, real: bool, changes: Any) -> None:
    artifact = cnn_artifact() if real else fake_artifact()
    data = write_artifact(artifact, engine_file).read_bytes()
    for change in changes:
        data = mutate(data, change)
    assert read(engine_file, data) in (None, artifact)


@fuzz(500)
@given(**EDIT)
def test_engine_files_with_changed_manifests(
    engine_file: Path, place: int, action: str, value: Any
) -> None:
    artifact = fake_artifact()
    manifest = json.loads(artifact.manifest.model_dump_json())
    text = json.dumps(edit(manifest, place, action, value))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("manifest.json", text)
        for name, content in artifact.members.items():
            archive.writestr(name, content)
    back = read(engine_file, buffer.getvalue())
    assert back is None or back.members == artifact.members


@fuzz(300)
@given(data=st.binary(max_size=300) | st.binary(max_size=100).map(lambda end: b"PK\3\4" + end))
def test_engine_files_of_anything(engine_file: Path, data: bytes) -> None:
    assert read(engine_file, data) is None


@fuzz(250)
@given(index=st.integers(0, 2), changes=CHANGES)
def test_models_with_changed_bytes(engine_file: Path, index: int, changes: Any) -> None:
    """A model carries no hash, so that it may load with other weights; nothing else may happen."""
    data = MODELS[index]
    for change in changes:
        data = mutate(data, change)
    path = engine_file.with_name("model.onnx")
    path.write_bytes(data)
    try:
        assert len(load_onnx(path).graph)
    except (ArtifactError, ExportError) as refusal:
        assert len(str(refusal)) < 700 + len(str(path))  # noqa: PT017 - loading is fine too
