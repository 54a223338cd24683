"""The engine file: a zip archive of stored members whose manifest is checked before anything runs.

`unzip -l` shows what is inside: manifest.json, the payload (model.onnx, model.plan, ...) and, for
calibrated engines, table.json.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from octavo.core.errors import ArtifactError
from octavo.core.files import atomic_path, sha256_bytes
from octavo.core.results import TensorSpec
from octavo.core.version import __version__

__all__ = ["FORMAT_VERSION", "Artifact", "Manifest", "Member", "read_artifact", "write_artifact"]

FORMAT: Final = "octavo-engine"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1 << 26

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Member(_Frozen):
    """One file inside an engine file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(_Frozen):
    """What an engine file holds and what it is valid for.

    Attributes:
        format: always "octavo-engine".
        format_version: version of this file format.
        octavo_version: which Octavo wrote it.
        backend: a key of `octavo.engines.BACKENDS`, where this Octavo has it.
        backend_version: of the library that built it.
        precision: "float32", "float16", "int8" or "int8+float16".
        architecture: what it runs on: "cpu", or GPU architectures such as "sm_86".
        device: name of the GPU model it is tied to; None where any of the architecture will do.
        model: fingerprint of the float model.
        calibration: SHA-256 of the calibration table; None for float engines.
        inputs: the model's inputs.
        outputs: its outputs.
        profiles: shape ranges it was built for, input -> (min, opt, max).
        reasons: name of a layer that was not quantized -> why not.
        members: the other files -> their size and hash.
    """

    format: Literal["octavo-engine"] = FORMAT
    format_version: int = FORMAT_VERSION
    octavo_version: str = __version__
    backend: Name
    backend_version: str
    precision: Literal["float32", "float16", "int8", "int8+float16"]
    architecture: tuple[str, ...] = ("cpu",)
    device: str | None = None
    model: str
    calibration: str | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = Field(
        default_factory=dict
    )
    reasons: dict[str, str] = Field(default_factory=dict, alias="skipped")
    members: dict[Name, Member] = Field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """An engine's manifest and its files.

    Attributes:
        manifest: as it will be written; `of` makes one with the hashes of the members.
        members: name -> content.
    """

    manifest: Manifest
    members: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of all members."""
        return sum(len(content) for content in self.members.values())

    @classmethod
    def of(cls, members: Mapping[str, bytes], **fields: Any) -> Artifact:
        """An artifact whose manifest holds the hashes of `members`."""
        hashes = {
            name: Member(size=len(content), sha256=sha256_bytes(content))
            for name, content in members.items()
        }
        return cls(Manifest(members=hashes, **fields), members)


def write_artifact(artifact: Artifact, path: str | os.PathLike[str]) -> Path:
    """Writes an engine file in one step; an older file stays until the new one is whole."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        files = {MANIFEST: artifact.manifest.model_dump_json(indent=1, by_alias=True).encode()}
        for name, content in {**files, **artifact.members}.items():
            # a fixed time, so that the same engine is the same file
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            archive.writestr(info, content)
    return Path(path)


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Reads an engine file and checks every byte of it against its manifest.

    Raises:
        ArtifactError: no such file, not an engine file, an unknown version, truncated, or damaged;
            the message says which and what to do.
    """
    target = Path(path)
    if not target.is_file():
        raise ArtifactError(f"there is no engine file {target}; build one with `octavo build`")
    try:
        with zipfile.ZipFile(target) as archive:
            manifest = _read_manifest(archive, target)
            members = {
                name: _read_member(archive, name, member, target)
                for name, member in manifest.members.items()
            }
            extra = set(archive.namelist()) - set(members) - {MANIFEST}
    except ArtifactError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds for damaged archives
        raise ArtifactError(
            f"{target} is not an Octavo engine file, or it is truncated or damaged "
            f"({type(error).__name__}: {str(error)[:200]}); build it again with `octavo build`"
        ) from error
    if extra:
        raise ArtifactError(
            f"{target} holds {sorted(extra)[0][:100]!r}, which its manifest does not list; it was "
            "changed after it was built, so build it again"
        )
    return Artifact(manifest, members)


def _read_manifest(archive: zipfile.ZipFile, path: Path) -> Manifest:
    names = archive.namelist()
    if MANIFEST not in names:
        raise ArtifactError(f"{path} is a zip file without {MANIFEST}; it is no Octavo engine")
    if len(set(names)) != len(names):
        raise ArtifactError(f"{path} holds a file twice; it is damaged, so build it again")
    text = _stored(archive, MANIFEST, path, LARGEST_MANIFEST)
    try:
        header = _Header.model_validate_json(text)
        if header.format == FORMAT and header.format_version != FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format version {header.format_version}, this Octavo {__version__} "
                f"reads {FORMAT_VERSION}; build it again, or install the Octavo that wrote it"
            )
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "its beginning"
        raise ArtifactError(
            f"the manifest of {path} is damaged at {where[:100]}: {first['msg'][:200]}; build the "
            "engine again"
        ) from error


def _read_member(archive: zipfile.ZipFile, name: str, member: Member, path: Path) -> bytes:
    if name not in archive.namelist():
        raise ArtifactError(f"{path} lacks {name}; it is truncated, so build it again")
    content = _stored(archive, name, path, member.size)
    if sha256_bytes(content) != member.sha256:
        raise ArtifactError(
            f"{name} in {path} does not match its SHA-256 in the manifest; the file is damaged or "
            "was changed, so build it again"
        )
    return content


def _stored(archive: zipfile.ZipFile, name: str, path: Path, limit: int) -> bytes:
    """Reads a member; compressed or oversized ones, which no engine has, are refused unread."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
        raise ArtifactError(
            f"{name} in {path} is compressed or larger than its manifest says; the file is "
            "damaged or was changed, so build it again"
        )
    return archive.read(name)


class _Header(BaseModel):
    format: str
    format_version: int
