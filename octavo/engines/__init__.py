"""Engines: one file per backend, one protocol, one checked file format."""

from octavo.engines.artifact import Artifact, Manifest, read_artifact, write_artifact
from octavo.engines.backend import (
    BACKENDS,
    PRECISIONS,
    BuildRequest,
    Profile,
    RunOptions,
    get_backend,
)
from octavo.engines.cache import cached
from octavo.engines.engine import Engine, Runner, check_any_int8

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Artifact",
    "BuildRequest",
    "Engine",
    "Manifest",
    "Profile",
    "RunOptions",
    "Runner",
    "cached",
    "check_any_int8",
    "get_backend",
    "read_artifact",
    "write_artifact",
]
