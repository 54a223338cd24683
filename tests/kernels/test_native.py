"""C that is compiled where it runs: what it needs, what it says where that is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.core.errors import OctavoWarning, UnsupportedError
from octavo.kernels.int8_gemm.native import LIBRARY
from octavo.kernels.native import library as native

pytestmark = pytest.mark.skipif(bool(LIBRARY.why_not()), reason=LIBRARY.why_not())

SOURCE = """
#include "native.h"
void twice(float *x, ptrdiff_t n, float by) { for (ptrdiff_t i = 0; i < n; i++) x[i] *= by; }
"""
TYPES = {"twice": [native.POINTER, native.SIZE, native.FLOAT]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, and no answers remembered from another."""
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "cache"))
    remembered = (native.why_not_here, native._compiler, native._version, native._takes)
    for function in remembered:
        function.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.undo()
    for function in remembered:
        function.cache_clear()


def library(tmp_path: Path, text: str = SOURCE) -> native.Library:
    path = tmp_path / "source.c"
    path.write_text(text)
    return native.Library(path, TYPES)


def test_it_is_compiled_once_and_called(tmp_path: Path, cache: Path) -> None:
    x = torch.arange(3.0)
    one = library(tmp_path)
    assert one.why_not() == ""
    one.twice(x.data_ptr(), 3, 2.0)
    assert x.tolist() == [0, 2, 4]
    (made,) = cache.rglob("*.so")
    before = made.stat().st_mtime_ns
    again = library(tmp_path)
    again.twice(x.data_ptr(), 3, 2.0)
    assert x.tolist() == [0, 4, 8]
    assert made.stat().st_mtime_ns == before
    library(tmp_path, SOURCE + "/* other */").twice(x.data_ptr(), 3, 2.0)
    assert len(list(cache.rglob("*.so"))) == 2
    with pytest.raises(AttributeError, match=r"source\.c has no function 'thrice'"):
        one.thrice()


def test_c_that_does_not_compile_is_told_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    one = library(tmp_path, "void twice( {")
    with pytest.warns(OctavoWarning, match=r"cannot compile source\.c: .*slower on this CPU"):
        reason = one.why_not()
    assert "source.c:1" in reason
    assert one.why_not() == reason  # without a second try
    assert not list(cache.rglob("*.so"))
    assert not list(cache.rglob("*.tmp"))
    with pytest.raises(UnsupportedError, match=r"cannot compile source\.c"):
        one.twice(0, 0, 1.0)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("OCTAVO_NATIVE", "0", "OCTAVO_NATIVE is 0"),
        ("CC", "no-such-compiler", "there is no C compiler; install gcc, or set CC"),
    ],
)
def test_what_is_missing(
    setting: str, value: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(setting, value)
    assert library(tmp_path).why_not() == reason


def test_a_processor_without_the_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"avx2"}))
    assert library(tmp_path).why_not().startswith("this processor has no AVX-512 VNNI")


def test_instructions_that_may_be_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processor has them and the compiler knows them; C is compiled anew with others."""
    source = """
    #include "native.h"
    #ifdef __AVX512VBMI__
    #define BY 3
    #else
    #define BY 2
    #endif
    void twice(float *x, ptrdiff_t n, float by) { for (ptrdiff_t i = 0; i < n; i++) x[i] = BY; }
    """
    there = native.cpu_flags() | {"avx512vbmi", "no_such"}
    x = torch.zeros(1)
    for optional, has, wanted in (
        (("avx512vbmi", "no_such"), there, 3),
        (("avx512vbmi", "no_such"), there - {"avx512vbmi"}, 2),
        ((), there, 2),
    ):
        monkeypatch.setattr(native, "OPTIONAL", optional)
        monkeypatch.setattr(native, "cpu_flags", lambda has=has: has)
        library(tmp_path, source).twice(x.data_ptr(), 1, 0.0)
        assert x.item() == wanted
    assert len(list(cache.rglob("*.so"))) == 2


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(OctavoWarning, match="slower on this CPU"):
        reason = library(tmp_path).why_not()
    assert "set OCTAVO_CACHE_DIR to a folder that can be written" in reason


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 7", "it exits with 7"),
        ("kill -9 $$", "it exits with -9"),
        ('case "$1" in --version) ;; *) sleep 60;; esac', "timed out after"),
    ],
)
def test_compilers_that_fail_without_a_word(
    script: str, told: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(native, "PATIENCE", 0.5)
    with pytest.warns(OctavoWarning, match=told):
        assert told in library(tmp_path).why_not()
    assert not [path for path in cache.rglob("*") if path.suffix in (".so", ".tmp")]


def test_a_file_in_the_cache_that_is_no_library(tmp_path: Path, cache: Path) -> None:
    one = library(tmp_path)
    native._compiled(one.source).write_bytes(b"cut off")
    with pytest.warns(OctavoWarning, match="cannot be loaded"):
        assert "delete it, or set OCTAVO_CACHE_DIR" in one.why_not()
    assert len(list(cache.rglob("*.so"))) == 1


CHILD = """
import torch
from octavo.kernels import explain, int8_gemm
one = torch.ones(1)
x = torch.full((70, 600), 2, dtype=torch.int8)
y = int8_gemm(x, x, one[0], one[0], out_dtype=torch.float32)
assert explain("int8_gemm").body == "native", explain("int8_gemm")
assert (y == 2400).all()
maps = open("/proc/self/maps").read().split()
print(len({part for part in maps if "libgomp" in part}))
"""


def test_processes_that_compile_at_once_and_share_torchs_threads(cache: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    for child in children:
        out, _ = child.communicate(timeout=120)
        assert child.returncode == 0
        assert out.strip() == b"1", "the OpenMP of torch serves both"
    assert len(list(cache.rglob("int8_gemm-native-*.so"))) == 1
    assert not list(cache.rglob("*.tmp"))


def test_as_many_threads_as_the_work_is_worth() -> None:
    most = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert native.threads_for(0) == 1
        assert native.threads_for(native.WORTH_A_THREAD) == 1
        assert native.threads_for(2 * native.WORTH_A_THREAD) == 2
        assert native.threads_for(1 << 40) == 2
    finally:
        torch.set_num_threads(most)
