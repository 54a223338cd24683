from __future__ import annotations

import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import cnn_artifact, fake_artifact

from octavo import __version__
from octavo.core.errors import ArtifactError
from octavo.core.files import sha256_bytes
from octavo.engines.artifact import FORMAT_VERSION, read_artifact, write_artifact


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_artifact(fake_artifact(), tmp_path / "net.octavo")


def rewrite(path: Path, change: Callable[[dict[str, bytes]], Any]) -> None:
    """Writes the archive anew after `change` did something to its files."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def edit_manifest(path: Path, **changes: Any) -> None:
    def change(files: dict[str, bytes]) -> None:
        manifest = json.loads(files["manifest.json"])
        files["manifest.json"] = json.dumps({**manifest, **changes}).encode()

    rewrite(path, change)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for index, artifact in enumerate((fake_artifact(), cnn_artifact(), cnn_artifact("float32"))):
        path = tmp_path / "new folder" / f"{index}.octavo"
        assert write_artifact(artifact, str(path)) == path
        back = read_artifact(path)
        assert back == artifact
        assert back.size_bytes == sum(map(len, artifact.members.values()))


def test_a_manifest_says_what_the_engine_is() -> None:
    manifest = cnn_artifact().manifest
    assert manifest.format == "octavo-engine"
    assert manifest.format_version == FORMAT_VERSION
    assert manifest.octavo_version == __version__
    assert manifest.architecture == ("cpu",)
    assert manifest.device is None
    assert manifest.calibration == sha256_bytes(cnn_artifact().members["table.json"])
    assert str(manifest.inputs[0]) == "x: float32[batch, 3, 8, 8]"
    assert str(manifest.outputs[0]) == "y: float32[batch, 4]"


def test_the_same_engine_is_the_same_file(tmp_path: Path) -> None:
    one = write_artifact(fake_artifact(), tmp_path / "one").read_bytes()
    assert write_artifact(fake_artifact(), tmp_path / "two").read_bytes() == one


def test_any_zip_tool_shows_what_is_inside(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["manifest.json", "model.onnx", "table.json"]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert json.loads(archive.read("manifest.json"))["backend"] == "onnxruntime"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("gone.octavo", ""):
        with pytest.raises(ArtifactError, match=r"there is no engine file .*octavo build"):
            read_artifact(tmp_path / name)


def test_truncated_anywhere_it_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"truncated or damaged .*build it again"):
            read_artifact(path)


def test_a_byte_changed_anywhere_is_refused_or_changes_nothing(path: Path) -> None:
    """Some bytes of a zip archive, such as times, mean nothing to an engine."""
    data, artifact = path.read_bytes(), fake_artifact()
    refused = []
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :])
        try:
            assert read_artifact(path) == artifact
        except ArtifactError as error:
            refused.append(str(error))
    assert len(refused) > 0.8 * len(data)
    assert all("net.octavo" in message for message in refused)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04K\x01.", b"{}", b"\0" * 4096])
def test_files_that_are_no_archive_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.octavo"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"net\.octavo is not an Octavo engine file"):
        read_artifact(path)


def test_a_foreign_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"...")
    with pytest.raises(ArtifactError, match=r"without manifest\.json; it is no Octavo engine"):
        read_artifact(path)


def test_the_manifest_of_something_else_is_refused(path: Path) -> None:
    edit_manifest(path, format="octavo-table")
    with pytest.raises(ArtifactError, match=r"damaged at format: .*'octavo-engine'"):
        read_artifact(path)


@pytest.mark.parametrize("version", [0, 2, 99])
def test_other_versions_are_named(path: Path, version: int) -> None:
    edit_manifest(path, format_version=version, something_new=True)
    message = rf"has format version {version}, this Octavo {__version__} reads 1; build it again"
    with pytest.raises(ArtifactError, match=message):
        read_artifact(path)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"precision": None}, "precision"),
        ({"precision": "int7"}, "precision"),
        ({"backend": "../abacus"}, "backend"),
        ({"inputs": [{"name": "x"}]}, "inputs.0.shape"),
        ({"profiles": {"x": [[1, 3]]}}, "profiles.x"),
        ({"surprise": 1}, "surprise"),
        ({"members": {"../escape": {"size": 1, "sha256": "0" * 64}}}, r"members\.\.\./escape"),
        ({"members": {"model.onnx": {"size": -1, "sha256": "0" * 64}}}, "members.*size"),
        ({"members": {"model.onnx": {"size": 1, "sha256": "0"}}}, "members.*sha256"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_manifest_says_where(path: Path, changes: dict[str, Any], place: str) -> None:
    edit_manifest(path, **changes)
    message = rf"the manifest of .*net\.octavo is damaged at {place}"
    with pytest.raises(ArtifactError, match=message):
        read_artifact(path)


def test_a_manifest_that_is_no_json_is_refused(path: Path) -> None:
    rewrite(path, lambda files: files.update({"manifest.json": b"[" * 100_000}))
    with pytest.raises(ArtifactError, match=r"manifest of .* is damaged at its beginning"):
        read_artifact(path)


def test_other_content_under_the_same_name_is_refused(path: Path) -> None:
    rewrite(path, lambda files: files.update({"model.onnx": bytes(256)}))
    with pytest.raises(ArtifactError, match=r"model\.onnx in .* does not match its SHA-256"):
        read_artifact(path)
    rewrite(path, lambda files: files.update({"model.onnx": b"short"}))
    with pytest.raises(ArtifactError, match=r"model\.onnx in .* does not match its SHA-256"):
        read_artifact(path)


def test_a_longer_member_is_refused_unread(path: Path) -> None:
    rewrite(path, lambda files: files.update({"model.onnx": bytes(10_000)}))
    with pytest.raises(ArtifactError, match=r"model\.onnx in .* larger than its manifest says"):
        read_artifact(path)


def test_a_missing_member_is_named(path: Path) -> None:
    rewrite(path, lambda files: files.pop("model.onnx"))
    with pytest.raises(ArtifactError, match=r"lacks model\.onnx; it is truncated"):
        read_artifact(path)


def test_a_member_too_many_is_named(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("extra.so", b"\x7fELF")
    with pytest.raises(ArtifactError, match=r"holds 'extra\.so', which its manifest does not list"):
        read_artifact(path)


def test_messages_do_not_print_what_a_damaged_file_holds(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x" * 60_000, b"")
    with pytest.raises(ArtifactError, match="holds 'xxx") as caught:
        read_artifact(path)
    assert len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_a_member_that_is_there_twice_is_refused(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, archive.read(name))
    with pytest.raises(ArtifactError, match="holds a file twice"):
        read_artifact(path)


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_compressed_members_are_refused_unread(path: Path, name: str) -> None:
    """A few kilobytes could otherwise unpack into all of the memory."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            packed = zipfile.ZIP_DEFLATED if member == name else zipfile.ZIP_STORED
            archive.writestr(member, content, compress_type=packed)
    with pytest.raises(ArtifactError, match=rf"{name} in .* is compressed or larger"):
        read_artifact(path)


def test_a_failing_write_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, old = zipfile.ZipFile.writestr, path.read_bytes()

    def full(self: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes) -> None:
        if info.filename == "table.json":
            raise OSError("no space left on device")
        real(self, info, content)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="no space left"):
        write_artifact(fake_artifact(precision="float32"), path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


WRITER = """
import sys, zipfile
sys.path[:0] = [{tests!r}]
from tiny_models import fake_artifact
from octavo.engines.artifact import write_artifact

real = zipfile.ZipFile.writestr
def slow(self, info, content):
    real(self, info, content)
    if info.filename == "model.onnx":
        self.fp.flush()
        print("half way", flush=True)
        sys.stdin.read()
zipfile.ZipFile.writestr = slow
write_artifact(fake_artifact(precision="float32"), {path!r})
"""


def test_a_writer_that_is_killed_leaves_the_old_file(path: Path) -> None:
    old = path.read_bytes()
    script = WRITER.format(tests=str(Path(__file__).parents[1]), path=str(path))
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        half = [item for item in path.parent.iterdir() if item != path]
        assert len(half) == 1
        assert half[0].stat().st_size > 256, "the new file is being written"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    assert read_artifact(path) == fake_artifact()
