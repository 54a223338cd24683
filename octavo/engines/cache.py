"""The engine cache: one file per key, safe for processes that build the same engine at once."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from octavo.core.errors import ArtifactError, OctavoWarning
from octavo.core.files import sha256_bytes
from octavo.core.version import __version__
from octavo.engines.artifact import FORMAT_VERSION, Artifact, read_artifact, write_artifact

__all__ = ["cache_key", "cached"]


def cache_key(parts: Mapping[str, Any]) -> str:
    """One name for everything an engine depends on, this Octavo's version included.

    Args:
        parts: model fingerprint, precision, profiles, calibration, backend and its version,
            architecture, ...; anything JSON can hold.
    """
    everything = {"octavo": __version__, "format": FORMAT_VERSION, "parts": dict(parts)}
    return sha256_bytes(json.dumps(everything, sort_keys=True).encode())


def cached(
    folder: str | os.PathLike[str], key: str, build: Callable[[], Artifact]
) -> tuple[Artifact, bool]:
    """The engine of this key: read from the cache, or built and put there.

    Processes that want the same key wait for the one that builds it. A file that turns out to be
    damaged is reported and built again.

    Args:
        folder: the cache; created where it is missing.
        key: from `cache_key`.
        build: makes the engine.

    Returns:
        the engine, and whether it came from the cache.
    """
    path = Path(folder) / f"{key}.octavo"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            try:
                return read_artifact(path), True
            except ArtifactError as error:
                warnings.warn(f"rebuilding a cached engine: {error}", OctavoWarning, stacklevel=2)
        artifact = build()
        write_artifact(artifact, path)
        return artifact, False
