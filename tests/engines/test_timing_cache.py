"""The timing cache file: kept, shared, and replaced where it cannot be used."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from fake_machine import TENSORRT_10, TENSORRT_11, Machine, make_machine
from fake_tensorrt import BuilderConfig, World
from tensorrt_samples import request

from octavo.core.errors import OctavoWarning
from octavo.core.files import sha256_bytes
from octavo.engines.tensorrt.backend import backend
from octavo.engines.tensorrt.timing_cache import HEADER, attach_timing_cache, save_timing_cache


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return make_machine(monkeypatch, TENSORRT_11)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "tensorrt.timing"


def config(owner: str = "gpu-1") -> BuilderConfig:
    return BuilderConfig(World(), owner)


def words(path: Path) -> list[str]:
    return path.read_bytes().partition(b"\n")[2].decode().split()


def save(path: Path, *measured: str, owner: str = "gpu-1") -> None:
    settings = config(owner)
    attach_timing_cache(settings, path)
    settings._cache._words.update(measured)
    save_timing_cache(settings, path)


def test_timings_come_back(path: Path) -> None:
    save(path, "conv", "gemm")
    settings = config()
    attach_timing_cache(settings, path)
    assert settings._cache._words == {"conv", "gemm"}


def test_what_another_build_wrote_meanwhile_is_kept(path: Path) -> None:
    first, second = config(), config()
    for settings in (first, second):
        attach_timing_cache(settings, path)
    for settings, word in ((first, "one"), (second, "two")):
        settings._cache._words.add(word)
        save_timing_cache(settings, path)
    assert words(path) == ["gpu-1", "one", "two"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_a_damaged_file_is_reported_and_written_anew(path: Path, damage: str) -> None:
    save(path, "conv", "gemm")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    texts = {"flip": bytes(content), "truncate": bytes(content[:-3]), "empty": b""}
    path.write_bytes(texts.get(damage, b"another tool's cache"))
    settings = config()
    with pytest.warns(OctavoWarning, match=r"tensorrt\.timing is not used, since it is damaged"):
        attach_timing_cache(settings, path)
    settings._cache._words.add("new")
    save_timing_cache(settings, path)
    assert words(path) == ["gpu-1", "new"]


@pytest.mark.parametrize("owner", ["gpu-2", "old", "unreadable"])
def test_timings_of_another_gpu_or_version_are_replaced(path: Path, owner: str) -> None:
    content = f"{owner} conv".encode()
    path.parent.mkdir()
    path.write_bytes(HEADER + sha256_bytes(content).encode() + b"\n" + content)
    mine = config()
    with pytest.warns(OctavoWarning, match="another GPU or version of TensorRT"):
        attach_timing_cache(mine, path)
    mine._cache._words.add("new")
    save_timing_cache(mine, path)
    assert words(path) == ["gpu-1", "new"]


def test_a_build_without_a_cache_writes_none(path: Path) -> None:
    save_timing_cache(config(), path)
    assert not path.exists()


def test_builds_share_the_file(machine: Machine, path: Path) -> None:
    for _ in range(2):
        backend.build(request(timing_cache=str(path)))
    assert words(path) == [f"gpu-{TENSORRT_11}", "measured"]
    machine.install(TENSORRT_10)
    with pytest.warns(OctavoWarning, match="another GPU or version"):
        backend.build(request(timing_cache=str(path)))
    assert words(path) == [f"gpu-{TENSORRT_10}", "measured"]


def test_the_real_library_takes_what_it_wrote(path: Path) -> None:
    """TensorRT for RTX keeps the calls, although it has nothing to measure."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    from octavo.engines.tensorrt.api import find_api

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for _ in range(2):
            settings = find_api("tensorrt-rtx").builder().create_builder_config()
            attach_timing_cache(settings, path)
            save_timing_cache(settings, path)
    assert path.stat().st_size > 100
