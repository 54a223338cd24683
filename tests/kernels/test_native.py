"""C that is compiled where it runs: what it needs, what it says where that is missing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.core.errors import OctavoWarning, UnsupportedError
from octavo.core.progress import NoProgress
from octavo.kernels.native import library as native

NO_C = native.reason_here()
pytestmark = pytest.mark.skipif(bool(NO_C), reason=NO_C)

SOURCE = """
#include "native.h"
void twice(float *x, ptrdiff_t n, float by) { for (ptrdiff_t i = 0; i < n; i++) x[i] *= by; }
"""
TYPES = {"twice": [native.POINTER, native.SIZE, native.FLOAT]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, and no answers remembered from another."""
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "cache"))
    remembered = (native.reason_here, native._compiler, native._version, native._takes)
    for function in remembered:
        function.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.undo()
    for function in remembered:
        function.cache_clear()


def library(tmp_path: Path, text: str = SOURCE, name: str = "source") -> native.Library:
    path = tmp_path / f"{name}.c"
    path.write_text(text)
    return native.Library(path, TYPES)


@pytest.fixture(scope="module")
def ready() -> dict[str, bytes]:
    """Where a library is kept for all tests, once one has compiled it."""
    return {}


@pytest.fixture
def compilations(ready: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are compiled; a copy of one library stands for each, and is quick."""
    made: list[str] = []
    compile_for_real = native._compile

    def compile_once(compiler: str, flags: Any, source: Path, target: Path) -> None:
        made.append(source.name)
        if not ready:
            compile_for_real(compiler, flags, source, target)
            ready["library"] = target.read_bytes()
        target.write_bytes(ready["library"])

    monkeypatch.setattr(native, "_compile", compile_once)
    return made


def test_it_is_compiled_once_and_called(
    tmp_path: Path, cache: Path, compilations: list[str]
) -> None:
    x = torch.arange(3.0)
    one = library(tmp_path)
    assert one.pending
    assert one.reason() == ""
    assert not one.pending
    one.twice(x.data_ptr(), 3, 2.0)
    assert x.tolist() == [0, 2, 4]
    (made,) = cache.rglob("*.so")
    again = library(tmp_path)
    again.twice(x.data_ptr(), 3, 2.0)
    assert x.tolist() == [0, 4, 8]
    assert list(cache.rglob("*.so")) == [made]
    assert compilations == ["source.c"]
    with pytest.raises(AttributeError, match=r"source\.c has no function 'thrice'"):
        one.thrice()


def test_another_source_and_another_file_that_is_included_are_compiled_anew(
    tmp_path: Path, cache: Path, compilations: list[str]
) -> None:
    included = tmp_path / "included.h"
    for text, part in ((SOURCE, "1"), (SOURCE + "/* other */", "1"), (SOURCE, "2")):
        included.write_text(part)
        one = library(tmp_path, text)
        one.includes = (included,)
        assert one.reason() == ""
    assert len(compilations) == len(list(cache.rglob("*.so"))) == 3


def test_the_cache_is_for_this_user_alone(
    tmp_path: Path, cache: Path, compilations: list[str]
) -> None:
    before = os.umask(0)
    try:
        assert library(tmp_path).reason() == ""
    finally:
        os.umask(before)
    (made,) = cache.rglob("*.so")
    for place in (made, made.parent, cache):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700


def _open_to_all(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.chmod(0o777)


def _open_to_the_group(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.chmod(0o770)


def _of_somebody_else(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(place, 4242, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4242)


@pytest.mark.parametrize("place", ["library", "folder", "cache"])
@pytest.mark.parametrize("change", [_open_to_all, _open_to_the_group, _of_somebody_else])
def test_what_others_may_write_to_is_not_run(
    place: str,
    change: Callable[[Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    cache: Path,
    compilations: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = native._compiled(library(tmp_path).source)
    change({"library": made, "folder": made.parent, "cache": cache}[place], monkeypatch)
    one = library(tmp_path)
    with pytest.warns(OctavoWarning, match=r"can be written by others, .*slower on this CPU"):
        reason = one.reason()
    assert "change its owner or mode (chmod 700), or set OCTAVO_CACHE_DIR" in reason
    assert one._loaded is None
    assert one.reason() == reason  # and one warning is enough


def test_c_that_does_not_compile_is_told_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    one = library(tmp_path, "void twice( {")
    with pytest.warns(OctavoWarning, match=r"cannot compile source\.c: .*slower on this CPU"):
        reason = one.reason()
    assert "source.c:1" in reason
    assert one.reason() == reason  # without a second try
    assert not list(cache.rglob("*.so"))
    assert not list(cache.rglob("*.tmp"))
    with pytest.raises(UnsupportedError, match=r"cannot compile source\.c"):
        one.twice(0, 0, 1.0)


def test_c_that_is_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_NATIVE", "0")
    assert library(tmp_path).reason() == "OCTAVO_NATIVE is 0"


def test_a_compiler_that_is_missing_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    wanted = "there is no C compiler; install gcc, or set CC"
    with pytest.warns(OctavoWarning, match=f"{wanted}; INT8 layers are slower on this CPU"):
        assert library(tmp_path).reason() == wanted
    # a second warning would be an error
    assert library(tmp_path, name="other").reason() == wanted


def test_a_processor_without_the_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"avx2"}))
    assert library(tmp_path).reason().startswith("this processor has no AVX-512 VNNI")


def test_instructions_that_may_be_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processor has them and the compiler knows them; C is compiled anew with others."""
    source = """
    #include <stddef.h>
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
        reason = library(tmp_path).reason()
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
        assert told in library(tmp_path).reason()
    assert not [path for path in cache.rglob("*") if path.suffix in (".so", ".tmp")]


def test_a_file_in_the_cache_that_is_no_library(
    tmp_path: Path, cache: Path, compilations: list[str]
) -> None:
    one = library(tmp_path)
    native._compiled(one.source).write_bytes(b"cut off")
    with pytest.warns(OctavoWarning, match="cannot be loaded"):
        assert "delete it, or set OCTAVO_CACHE_DIR" in one.reason()
    assert len(list(cache.rglob("*.so"))) == 1


class Shown(NoProgress):
    """Takes note of what is shown."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int | None]] = []
        self.steps = 0

    @contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        self.tasks.append((title, total))

        def advance(steps: int) -> None:
            self.steps += steps

        yield advance


def test_libraries_are_prepared_at_once_and_once(tmp_path: Path, compilations: list[str]) -> None:
    shown = Shown()
    one, two = (library(tmp_path, name=name) for name in ("one", "two"))
    assert two.reason() == ""
    native.prepare([one, two, one], shown)
    assert shown.tasks == [("Compiling C for this processor", 1)]
    assert shown.steps == 1
    assert sorted(compilations) == ["one.c", "two.c"]
    assert not one.pending
    native.prepare([one, two], shown)
    assert len(shown.tasks) == 1, "nothing is left to do"


def test_preparing_leaves_out_what_does_not_compile(tmp_path: Path) -> None:
    good, bad = library(tmp_path), library(tmp_path, "void twice( {", "bad")
    with pytest.warns(OctavoWarning, match=r"cannot compile bad\.c"):
        native.prepare([bad, good])
    assert good.reason() == ""
    assert "bad.c:1" in bad.reason()


def test_nothing_is_prepared_where_no_c_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_NATIVE", "0")
    shown, one = Shown(), library(tmp_path)
    native.prepare([one], shown)
    assert not shown.tasks
    assert one.pending


THREADS = """
#include <omp.h>
void threads(int *most, int *used) {
    *most = omp_get_max_threads();
#pragma omp parallel num_threads(2)
    *used = omp_get_num_threads();
}
"""
COMPILER = """#!/bin/sh
case "$*" in *-shared*) echo once >> "{log}"; sleep 0.2;; esac
exec "{compiler}" "$@"
"""
CHILD = """
import sys
from pathlib import Path
import torch
from octavo.kernels.native.library import POINTER, Library
library = Library(Path(sys.argv[1]), {"threads": [POINTER] * 2})
torch.set_num_threads(3)
found = torch.zeros(2, dtype=torch.int32)
print("ready", flush=True)
sys.stdin.readline()
library.threads(found.data_ptr(), found[1:].data_ptr())
maps = open("/proc/self/maps").read().split()
print(*found.tolist(), len({part for part in maps if "libgomp" in part}))
"""


def test_processes_that_compile_at_once_and_share_torchs_threads(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, compiler, log = (tmp_path / name for name in ("threads.c", "compiler", "log"))
    source.write_text(THREADS)
    compiler.write_text(COMPILER.format(log=log, compiler=native._compiler()))
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    native._compiler.cache_clear()
    command = [sys.executable, "-c", CHILD, str(source)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(1) as other:
            made = other.submit(native._compiled, source)
            out, _ = child.communicate("go\n", timeout=60)
    assert child.returncode == 0
    assert out.split() == ["3", "2", "1"], "the OpenMP of torch serves both"
    assert log.read_text() == "once\n", "who comes second waits for the first"
    assert list(cache.rglob("*.so")) == [made.result()]
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
