"""The file that keeps what TensorRT measured, so that the next build need not measure it again.

One line with a SHA-256 comes first, then what TensorRT wrote.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from filelock import FileLock

from octavo.core.errors import OctavoWarning
from octavo.core.files import atomic_write, sha256_bytes
from octavo.engines.tensorrt.types import BuilderConfig, TimingCache

__all__ = ["attach_timing_cache", "save_timing_cache"]

HEADER = b"octavo-timing-cache 1 "


def attach_timing_cache(config: BuilderConfig, path: str | os.PathLike[str]) -> None:
    """Gives a build the timings of a file, or none where there is no file yet.

    A file that is damaged, or that another GPU or version of TensorRT wrote, is reported as a
    warning, left unused and written anew after the build.

    Args:
        config: of the build.
        path: of the file.
    """
    blob = _read(Path(path))
    cache = None if blob is None else _load(config, blob)
    if cache is None or not config.set_timing_cache(cache, False):
        if blob is not None:
            _warn(path, "another GPU or version of TensorRT wrote it")
        empty = config.create_timing_cache(b"")
        if empty is not None:
            config.set_timing_cache(empty, False)


def save_timing_cache(config: BuilderConfig, path: str | os.PathLike[str]) -> None:
    """Writes the timings of a build, together with what others put into the file meanwhile."""
    target = Path(path)
    cache = config.get_timing_cache()
    if cache is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        blob = _read(target, quiet=True)
        other = None if blob is None else _load(config, blob)
        if other is not None:
            cache.combine(other, False)  # False for a foreign one, which is then replaced
        content = bytes(cache.serialize())
        atomic_write(target, HEADER + sha256_bytes(content).encode() + b"\n" + content)


def _read(path: Path, *, quiet: bool = False) -> bytes | None:
    if not path.is_file():
        return None
    header, _, content = path.read_bytes().partition(b"\n")
    if header == HEADER + sha256_bytes(content).encode():
        return content
    if not quiet:
        _warn(path, "it is damaged")
    return None


def _load(config: BuilderConfig, blob: bytes) -> TimingCache | None:
    try:
        return config.create_timing_cache(blob)
    except RuntimeError:  # what some versions raise where others return nothing
        return None


def _warn(path: str | os.PathLike[str], reason: str) -> None:
    warnings.warn(
        f"the timing cache {path} is not used, since {reason}; the build measures again and "
        "writes it anew",
        OctavoWarning,
        stacklevel=4,
    )
