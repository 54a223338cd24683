"""Files that are never left half-written, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "atomic_path",
    "atomic_write",
    "cache_folder",
    "others_may_write",
    "private_folder",
    "sha256_bytes",
]


def cache_folder() -> Path:
    """The user's cache: $OCTAVO_CACHE_DIR, or octavo/ in $XDG_CACHE_HOME, or ~/.cache/octavo."""
    ours = os.environ.get("OCTAVO_CACHE_DIR")
    if ours:
        return Path(ours).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "octavo"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` when the block ends well.

    The folder is created where it is missing, and the file gets the permissions that the umask
    leaves. When the block raises, the temporary file is removed and an older file at `path` stays
    as it was.

    Args:
        path: where the finished file goes.

    Yields:
        the path to write to.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    permissions = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # A writer may have put a private file of its own in place of ours.
        temporary.chmod(permissions)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Writes `data` (text as UTF-8) to `path` in one step and returns the path."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)


def private_folder(path: str | os.PathLike[str]) -> Path:
    """Makes a folder, and those above it that are missing, for nobody but this user (mode 0700)."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.parent != folder:
            private_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def others_may_write(path: str | os.PathLike[str]) -> bool:
    """Whether somebody else than this user and the administrator may change a file or folder."""
    facts = Path(path).stat()
    return facts.st_uid not in (os.getuid(), 0) or bool(facts.st_mode & 0o022)


def sha256_bytes(data: bytes | memoryview) -> str:
    """The SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
