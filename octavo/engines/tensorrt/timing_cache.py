"""The file that keeps what TensorRT measured, so that the next build need not measure it again.

One line with a SHA-256 comes first, then what TensorRT wrote.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from octavo.core.errors import OctavoWarning
from octavo.core.files import atomic_write, sha256_bytes

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["attach_timing_cache", "save_timing_cache"]

HEADER = b"octavo-timing-cache 1 "


def attach_timing_cache(config: trt.IBuilderConfig, path: str | os.PathLike[str]) -> None:
    """Gives a build the timings of a file, or none where there is no file yet.

    A file that is damaged, or that another GPU or version of TensorRT wrote, is reported as a
    warning, left unused and written anew after the build.

    Args:
        config: of the build.
        path: of the file.
    """
    cache, reason = _read(config, Path(path))
    if cache is not None and config.set_timing_cache(cache, False):
        return
    if reason:
        warnings.warn(
            f"the timing cache {path} is not used, since {reason}; the build measures again and "
            "writes it anew",
            OctavoWarning,
            stacklevel=3,
        )
    empty = config.create_timing_cache(b"")
    if empty is not None:
        config.set_timing_cache(empty, False)


def save_timing_cache(config: trt.IBuilderConfig, path: str | os.PathLike[str]) -> None:
    """Writes the timings of a build, together with what others put into the file meanwhile."""
    target = Path(path)
    cache = config.get_timing_cache()
    if cache is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        other, _ = _read(config, target)
        if other is not None:
            cache.combine(other, False)  # False for a foreign one, which is then replaced
        content = bytes(cache.serialize())
        atomic_write(target, HEADER + sha256_bytes(content).encode() + b"\n" + content)


def _read(config: trt.IBuilderConfig, path: Path) -> tuple[trt.ITimingCache | None, str]:
    """The timings in a file, and what is wrong with it where TensorRT does not take them."""
    if not path.is_file():
        return None, ""
    header, _, content = path.read_bytes().partition(b"\n")
    if header != HEADER + sha256_bytes(content).encode():
        return None, "it is damaged"
    foreign = "another GPU or version of TensorRT wrote it"
    try:
        return config.create_timing_cache(content), foreign
    except RuntimeError:  # what some versions raise where others return nothing
        return None, foreign
