"""What a backend is: it says whether it can run here, builds artifacts and opens them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_ir as ir

from octavo.core.errors import InputError
from octavo.core.files import sha256_bytes
from octavo.core.progress import NoProgress, Progress
from octavo.engines.artifact import Artifact
from octavo.engines.engine import Runner
from octavo.export.onnx_model import input_specs, output_specs
from octavo.export.qdq import QdqModel

__all__ = [
    "BACKENDS",
    "DEFAULT_OPTIONS",
    "PRECISIONS",
    "Backend",
    "BuildRequest",
    "Profile",
    "RunOptions",
    "get_backend",
]

PRECISIONS = ("float32", "float16", "int8", "int8+float16")
"""What may be asked for; "int8+float16" runs what is not INT8 in float16."""

BACKENDS: Mapping[str, str] = {
    "onnxruntime": "octavo.engines.onnxruntime",
    "tensorrt": "octavo.engines.tensorrt.backend",
    "tensorrt-rtx": "octavo.engines.tensorrt.rtx",
}
"""Name -> module; a backend's libraries are imported when it is first used."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Shapes of one input that an engine is built for, and the one it is tuned for."""

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        ordered = len(self.min) == len(self.opt) == len(self.max) and all(
            1 <= low <= best <= high
            for low, best, high in zip(self.min, self.opt, self.max, strict=False)
        )
        if not ordered:
            raise InputError(
                f"profile {self.min}:{self.opt}:{self.max} is not in order; every axis needs "
                "1 <= min <= opt <= max"
            )


@dataclass(frozen=True)
class BuildRequest:
    """Everything a backend needs to build an engine.

    Attributes:
        model: the float graph.
        quantized: the Q/DQ graph for the INT8 precisions, else None.
        precision: one of `PRECISIONS`.
        fingerprint: of the float graph.
        table: the calibration table as JSON, or None.
        peaks: tensor name -> largest magnitude seen, for float16.
        profiles: input name -> shapes; an input without dynamic axes needs none.
        targets: GPU architectures to build for ahead of time ("sm_86"); empty for this machine's.
        timing_cache: where to keep measured timings between builds, or None.
        progress: where to show progress.
    """

    model: ir.Model
    quantized: QdqModel | None
    precision: str
    fingerprint: str
    table: str | None = None
    peaks: Mapping[str, float] = field(default_factory=dict)
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    targets: Sequence[str] = ()
    timing_cache: str | None = None
    progress: Progress = field(default_factory=NoProgress)

    def artifact(self, members: Mapping[str, bytes], model: ir.Model, **fields: Any) -> Artifact:
        """What was built, as an engine file.

        Args:
            members: the files that the backend made; the table is put beside them.
            model: the graph that they compute.
            **fields: of the manifest: what the backend knows and the request does not say.
        """
        table = None if self.table is None else self.table.encode()
        return Artifact.of(
            dict(members) if table is None else {**members, "table.json": table},
            precision=self.precision,
            model=self.fingerprint,
            calibration=None if table is None else sha256_bytes(table),
            inputs=input_specs(model),
            outputs=output_specs(model),
            reasons=dict(self.quantized.reasons) if self.quantized else {},
            **fields,
        )


@dataclass(frozen=True)
class RunOptions:
    """How to run an engine, where its backend has more than one way.

    Attributes:
        runner: "torch" (torch's CUDA tensors and stream) or "pycuda" (numpy arrays, no CUDA in
            torch needed); None for torch where it has CUDA, else pycuda.
        cuda_graph: record a CUDA graph for each shape of the inputs and replay it.
    """

    runner: str | None = None
    cuda_graph: bool = False


DEFAULT_OPTIONS = RunOptions()


class Backend(Protocol):
    """A way to build and run engines.

    Attributes:
        name: what callers and engine files call it.
        activations: the type of activations it is most exact and fastest with; calibration takes
            it where `build` is given data. With "uint8", what an int8 table says of tensors that
            cannot be negative is turned into unsigned codes (see `octavo.export.unsigned_spec`).
    """

    name: str
    activations: str

    def missing(self) -> str:
        """Why it cannot be used here and how to change that; empty if it can."""
        ...

    def version(self) -> str:
        """Version of the library behind it."""
        ...

    def check(self, precision: str, targets: Sequence[str]) -> None:
        """Refuses at once, before any calibration, what the backend cannot build.

        Raises:
            UnsupportedError: it has no such precision or target; says why and what it has.
            InputError: it has to be given targets.
        """
        ...

    def environment(self, targets: Sequence[str]) -> Mapping[str, str]:
        """What else an engine of these targets depends on: architecture, device, versions."""
        ...

    def build(self, request: BuildRequest) -> Artifact:
        """Builds an engine.

        Raises:
            UnsupportedError: the backend cannot do what is asked for.
            BuildError: it tried and failed.
        """
        ...

    def open(self, artifact: Artifact, options: RunOptions = DEFAULT_OPTIONS) -> Runner:
        """Opens an engine to run it here.

        Raises:
            UnsupportedError: there is no GPU, or the backend has no such options.
            ArtifactError: it was built for something else; the message says what does not match.
        """
        ...


def get_backend(name: str) -> Backend:
    """Looks a backend up by name.

    Raises:
        InputError: no such backend.
    """
    if name not in BACKENDS:
        raise InputError(f"no backend is called {name!r}; choose from {', '.join(BACKENDS)}")
    backend: Backend = importlib.import_module(BACKENDS[name]).backend
    return backend
