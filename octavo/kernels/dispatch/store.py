"""Files that keep what was measured on a GPU: configurations of kernels, and who won.

A user's files lie in the cache folder, one for each operator, kind, GPU, driver, versions and
source; configurations that come with the package in kernels/<operator>/configs/<gpu>.json. Both
look the same:

    {"format": 1, "kind": "configs", "facts": {"operator": ..., "gpu": ..., "source": ...},
     "entries": {key: {"chosen": {"BLOCK_M": 64, ...}, "microseconds": {...}, "failures": {...}}}}

`chosen` is a mapping to integers for kind "configs", and a name for kind "implementations".
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from octavo.core.errors import OctavoWarning
from octavo.core.files import atomic_write, cache_folder, private_folder
from octavo.core.machine import package_version

__all__ = [
    "Table",
    "device_facts",
    "gpu_slug",
    "packaged_entries",
    "source_digest",
    "user_table",
]

FORMAT = 1
KERNELS = Path(__file__).parents[1]
"""Where the operators' folders are."""


def gpu_slug(name: str) -> str:
    """A device's name as part of a file's name: "NVIDIA H200" gives "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def device_facts(device: torch.device) -> dict[str, str]:
    """What measured times depend on besides the code: GPU, driver and versions."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "triton": package_version("triton") or "none",
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
    }


def _driver() -> str:
    """Version of NVIDIA's kernel module, or "unknown" where the system does not tell."""
    version = Path("/proc/driver/nvidia/version")
    if not version.is_file():
        return "unknown"
    found = re.search(r"Kernel Module\D*([\d.]+)", version.read_text(errors="replace"))
    return found.group(1) if found else "unknown"


@functools.cache
def source_digest(operator: str, *, kernels_only: bool) -> str:
    """SHA-256 of an operator's source files, and of the Triton helpers that operators share.

    Args:
        operator: name of its folder.
        kernels_only: leave out the files without kernels, which do not matter to configurations.
    """
    apart = {"__init__.py", "cases.py", *(("schema.py", "reference.py") if kernels_only else ())}
    own = (path for path in (KERNELS / operator).glob("*.py") if path.name not in apart)
    digest = hashlib.sha256()
    for path in sorted({*KERNELS.rglob("triton_*.py"), *own}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class Table:
    """A file of choices, safe for several processes, rebuilt where it is damaged.

    Args:
        path: of the file, which need not exist.
        kind: "configs" or "implementations".
        facts: what the choices depend on; a file with others is not used.
    """

    def __init__(self, path: Path, kind: str, facts: Mapping[str, str]) -> None:
        self.path, self.kind, self.facts = path, kind, dict(facts)

    def read(self) -> dict[str, dict[str, Any]]:
        """Its entries; none, with a warning, where the file is damaged."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._damaged(str(error))
        try:
            document = json.loads(text)
        except ValueError as error:
            return self._damaged(f"it is not JSON ({error})")
        reason = _problem(document, self.kind, self.facts)
        if reason:
            return self._damaged(reason)
        entries: dict[str, dict[str, Any]] = document["entries"]
        return entries

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds other processes and threads back; the system releases it when a process dies."""
        with contextlib.ExitStack() as stack:
            try:
                private_folder(self.path.parent)
                stack.enter_context(FileLock(self.path.with_suffix(".lock")))
            except OSError as error:
                self._unwritable(error)
            yield

    def put(self, key: str, entry: Mapping[str, Any]) -> None:
        """Adds an entry to what the file holds by now; call it under the lock."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OctavoWarning)  # `read` has warned before
            entries = self.read()
        document = {
            "format": FORMAT,
            "kind": self.kind,
            "facts": self.facts,
            "entries": {**entries, key: dict(entry)},
        }
        try:
            atomic_write(self.path, json.dumps(document, indent=1) + "\n")
        except OSError as error:
            self._unwritable(error)

    def _damaged(self, reason: str) -> dict[str, dict[str, Any]]:
        warnings.warn(
            f"{self.path} is not used, since {reason}; what it held is measured again",
            OctavoWarning,
            stacklevel=3,
        )
        return {}

    def _unwritable(self, error: OSError) -> None:
        warnings.warn(
            f"what was measured cannot be kept in {self.path} ({error}); set OCTAVO_CACHE_DIR to "
            "a folder that can be written, or every process measures again",
            OctavoWarning,
            stacklevel=3,
        )


def user_table(operator: str, kind: str, device: torch.device) -> Table:
    """The table in the user's cache for this operator, device, driver, versions and source."""
    ours, base = os.environ.get("OCTAVO_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    return _user_table(operator, kind, device, ours, base)


@functools.cache
def _user_table(operator: str, kind: str, device: torch.device, *_folders: str | None) -> Table:
    facts = {
        "operator": operator,
        **device_facts(device),
        "source": source_digest(operator, kernels_only=kind == "configs"),
    }
    if kind == "configs":  # configurations depend on the compiler, not on torch
        del facts["torch"], facts["cuda"]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "kernels" / gpu_slug(facts["gpu"])
    return Table(folder / f"{operator}-{kind}-{digest}.json", kind, facts)


def packaged_entries(operator: str, device: torch.device) -> dict[str, dict[str, Any]]:
    """Configurations that come with the package for this GPU; measured under any driver."""
    name = device_facts(device)["gpu"]
    path = KERNELS / operator / "configs" / f"{gpu_slug(name)}.json"
    return Table(path, "configs", {"operator": operator, "gpu": name}).read()


def _problem(document: object, kind: str, facts: Mapping[str, str]) -> str:
    """Why a file's content cannot be used, or nothing."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return f"it is not a file of choices of format {FORMAT}"
    if document.get("kind") != kind:
        return f"it holds {document.get('kind')!r}, not {kind!r}"
    found = document.get("facts")
    if not isinstance(found, dict) or any(found.get(name) != facts[name] for name in facts):
        return "it was measured on another device or with other versions"
    entries = document.get("entries")
    if not isinstance(entries, dict):
        return "it has no entries"
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not _is_choice(entry.get("chosen"), kind):
            return f"its entry {key!r} names no choice"
    return ""


def _is_choice(chosen: object, kind: str) -> bool:
    if kind == "implementations":
        return isinstance(chosen, str)
    return isinstance(chosen, dict) and all(type(value) is int for value in chosen.values())
