"""C for CPUs, compiled once on the machine where it runs and kept in the user's cache.

An operator's C stands beside its other implementations (`native.c`), and what operators share in
the headers beside this file. It takes pointers and sizes, and knows nothing of torch: one file
compiles in about a second, with whatever C compiler there is, for every version of torch and
Python. Threads are those of torch: the OpenMP that torch has loaded serves both.

What is loaded runs with this user's rights, so the cache folder is made for this user alone, and a
library that others may write to is refused.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from octavo.core.errors import OctavoWarning, UnsupportedError
from octavo.core.files import atomic_path, cache_folder, others_may_write, private_folder
from octavo.core.machine import cpu_flags
from octavo.core.progress import NoProgress, Progress

__all__ = ["FLOAT", "INT", "POINTER", "SIZE", "Library", "pointer", "prepare", "threads_for"]

POINTER, SIZE = ctypes.c_void_p, ctypes.c_ssize_t
INT, FLOAT = ctypes.c_int, ctypes.c_float
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
"""Instructions as Linux names them."""
FLAGS = (
    "-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off",
    *(f"-m{name.replace('_', '')}" for name in NEEDED), "-mfma",
)  # fmt: skip
OPTIONAL = ("avx512_bf16",)
"""Instructions that C may use where the processor has them and the compiler knows them; it asks
with `#ifdef`."""
HEADERS = Path(__file__).parent
PATIENCE = 120
"""Seconds that a compiler may take."""
WORTH_A_THREAD = 1 << 12
"""Steps of a kernel's innermost loop below which a further thread takes longer than it helps."""


class Library:
    """The functions of a C file.

    Args:
        source: the file.
        functions: name -> types of its arguments; none returns anything.
        includes: other files of ours that it includes, besides the headers of this folder.
    """

    def __init__(
        self, source: Path, functions: Mapping[str, Sequence[Any]], includes: Sequence[Path] = ()
    ) -> None:
        self.source, self.functions, self.includes = source, functions, tuple(includes)
        self._loaded: ctypes.CDLL | None = None
        self._reason: str | None = None

    def reason(self) -> str:
        """Why it cannot be called here, or nothing; compiles it the first time it is asked."""
        if self._reason is None:
            try:
                self._loaded = self._load()
                self._reason = ""
            except UnsupportedError as error:
                self._reason = str(error)
        return self._reason

    @property
    def pending(self) -> bool:
        """Whether nobody has asked for it yet in this process."""
        return self._reason is None

    # torch.compile takes the answer as it is while it traces: see int8_gemm/int_mm.py
    reason._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name not in self.functions:
            raise AttributeError(f"{self.source.name} has no function {name!r}")
        reason = self.reason()
        if reason:
            raise UnsupportedError(reason)
        function = getattr(self._loaded, name)
        setattr(self, name, function)  # so that the next call finds it at once
        return function

    def _load(self) -> ctypes.CDLL:
        reason = reason_here()
        if reason:
            raise UnsupportedError(reason)
        path = _compiled(self.source, self.includes)
        for place in (path, path.parent, cache_folder()):
            if others_may_write(place):
                raise _told(
                    f"{place} can be written by others, so what it holds is not run; change its "
                    "owner or mode (chmod 700), or set OCTAVO_CACHE_DIR to a folder of your own"
                )
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise _told(
                f"{path} cannot be loaded ({error}); delete it, or set OCTAVO_CACHE_DIR to a "
                "folder from which programs may run"
            ) from error
        for name, types in self.functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = list(types), None
        return library


@functools.cache
def reason_here() -> str:
    """Why no C can run here, or nothing."""
    if os.environ.get("OCTAVO_NATIVE") == "0":
        return "OCTAVO_NATIVE is 0"
    missing = [name for name in NEEDED if name not in cpu_flags()]
    if sys.platform != "linux" or missing:
        return "this processor has no AVX-512 VNNI, or the system does not say so"
    if _compiler() is None:
        return str(_told("there is no C compiler; install gcc, or set CC"))
    return ""


@functools.cache
def _compiler() -> str | None:
    asked = os.environ.get("CC")
    names = (asked,) if asked else ("gcc", "cc", "clang")
    return next((found for name in names if (found := shutil.which(name))), None)


def prepare(libraries: Sequence[Library], progress: Progress | None = None) -> None:
    """Compiles libraries now, and not when a model is first called.

    Args:
        libraries: that a model will use; those that cannot be had here are left out.
        progress: where to show progress, where anything has to be compiled.
    """
    wanted = [one for one in dict.fromkeys(libraries) if one.pending]
    if not wanted or reason_here():
        return
    shown = progress or NoProgress()
    with (
        shown.task("Compiling C for this processor", len(wanted)) as advance,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for _ in pool.map(Library.reason, wanted):
            advance(1)


def _compiled(source: Path, includes: Sequence[Path] = ()) -> Path:
    """The shared library of a C file, from the cache where this source was compiled before."""
    compiler = str(_compiler())  # `reason_here` has seen that there is one
    digest = hashlib.sha256()
    parts = [path.read_bytes() for path in (source, *includes, *sorted(HEADERS.glob("*.h")))]
    flags = (*FLAGS, *_optional_flags(compiler))
    for part in (*parts, " ".join(flags).encode()):
        digest.update(part + b"\0")
    digest.update(_version(compiler).encode())
    folder = cache_folder() / "native"
    library = folder / f"{source.parent.name}-{source.stem}-{digest.hexdigest()[:16]}.so"
    try:
        private_folder(folder)
        with FileLock(library.with_suffix(".lock")):
            if not library.is_file():
                with atomic_path(library) as unfinished:
                    _compile(compiler, flags, source, unfinished)
                library.chmod(0o700)
    except OSError as error:
        raise _told(
            f"compiled C cannot be kept in {folder} ({error}); set OCTAVO_CACHE_DIR to a folder "
            "that can be written"
        ) from error
    return library


@functools.cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"]).stdout


def _optional_flags(compiler: str) -> tuple[str, ...]:
    flags = tuple(f"-m{name.replace('_', '')}" for name in OPTIONAL if name in cpu_flags())
    return tuple(flag for flag in flags if _takes(compiler, flag))


@functools.cache
def _takes(compiler: str, flag: str) -> bool:
    return not _run([compiler, flag, "-fsyntax-only", "-x", "c", os.devnull]).returncode


def _compile(compiler: str, flags: Sequence[str], source: Path, target: Path) -> None:
    done = _run([compiler, *flags, f"-I{HEADERS}", str(source), "-o", str(target), "-lm"])
    if done.returncode:
        problem = (done.stderr.strip() or f"it exits with {done.returncode}").splitlines()[0]
        raise _told(f"{compiler} cannot compile {source.name}: {problem}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _told(f"{command[0]} does not run: {error}") from error


def _told(reason: str) -> UnsupportedError:
    """The error of C that should run here and does not, after a warning that it is missed."""
    warnings.warn(
        f"{reason}; INT8 layers are slower on this CPU without it", OctavoWarning, stacklevel=2
    )
    return UnsupportedError(reason)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's memory begins; NULL for none."""
    return None if tensor is None else tensor.data_ptr()


def threads_for(steps: int, worth: int = WORTH_A_THREAD) -> int:
    """How many threads so many steps are worth, of those that torch may use.

    Args:
        steps: of a kernel's innermost loop, or what else is counted.
        worth: how many of them a thread should have.
    """
    return max(1, min(torch.get_num_threads(), steps // worth))
