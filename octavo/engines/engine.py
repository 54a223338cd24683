"""The engine: one object to run a built model with, whatever built it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from octavo.core.errors import BuildError, InputError
from octavo.core.feeds import as_feeds
from octavo.core.results import LayerReport, TensorSpec
from octavo.engines.artifact import Artifact, Manifest, write_artifact

__all__ = ["Engine", "Runner", "check_any_int8"]


class Runner(Protocol):
    """What a backend has to provide to run an engine."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs an engine.

        Args:
            feeds: input name -> numpy array, or tensor on any device where `takes_torch`.

        Returns:
            output name -> a new array, or a new tensor on the engine's device.

        Raises:
            InputError: a dtype or shape that the engine does not take.
            BuildError: the runner is closed, or the backend refuses.
        """
        ...

    @property
    def takes_torch(self) -> bool:
        """Whether inputs and outputs are torch tensors; else they are numpy arrays."""
        ...

    def layers(self) -> LayerReport:
        """What the backend runs in which precision."""
        ...

    def close(self) -> None:
        """Frees the backend's memory; more than one call does no harm."""
        ...


class Engine:
    """A built model.

    Call it with arrays in the order of the inputs, or `run` it with a dict. Torch tensors give
    torch tensors (on the device of the first input), numpy arrays give numpy arrays. Use it as a
    context manager, or `close` it.

    The backend opens it at its first use, so an engine that was built for another machine can be
    saved here.

    Args:
        artifact: the file it was or can be saved as.
        opener: opens the artifact; from the backend.
    """

    def __init__(self, artifact: Artifact, opener: Callable[[Artifact], Runner]) -> None:
        self.artifact = artifact
        self._opener = opener
        self._runner: Runner | None = None
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        """What the engine holds and is valid for."""
        return self.artifact.manifest

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape (dynamic axes by name) and dtype of each input."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape and dtype of each output."""
        return self.manifest.outputs

    @property
    def backend(self) -> str:
        """The name of the backend that runs it."""
        return self.manifest.backend

    @property
    def precision(self) -> str:
        """The precision that was asked for; `layers` says what every layer runs in."""
        return self.manifest.precision

    @property
    def size_bytes(self) -> int:
        """Bytes of the model as the backend loads it (without the calibration table)."""
        members = self.manifest.members
        return sum(member.size for name, member in members.items() if name != "table.json")

    def __call__(self, *arrays: Any) -> Any:
        """Runs the engine.

        Args:
            *arrays: one torch tensor or numpy array an input, in order.

        Returns:
            one array for a model of one output, a tuple for several.

        Raises:
            InputError: a wrong number of arrays, shape or dtype.
        """
        results = tuple(self._run(arrays, arrays).values())
        return results[0] if len(results) == 1 else results

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs the engine with inputs by name.

        Args:
            feeds: input name -> torch tensor or numpy array.

        Returns:
            output name -> array, torch where an input was torch, else numpy.

        Raises:
            InputError: a wrong name, shape or dtype.
        """
        return self._run(feeds, tuple(feeds.values()))

    def layers(self) -> LayerReport:
        """What ran in which precision, and why not in INT8, as the backend itself reports it."""
        return self.open().layers()

    def open(self) -> Runner:
        """Opens the engine on this machine, where that has not happened yet.

        Raises:
            ArtifactError: it was built for another machine or version; says what does not match.
            BuildError: it was closed.
        """
        if self._closed:
            raise BuildError("this engine is closed; load it again with octavo.load")
        if self._runner is None:
            self._runner = self._opener(self.artifact)
        return self._runner

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the engine to a file, in one step; `octavo.load` reads it back."""
        return write_artifact(self.artifact, path)

    def close(self) -> None:
        """Frees what the backend holds; the engine can still be saved, but not run."""
        self._closed = True
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        specs = ", ".join(map(str, self.inputs))
        return f"Engine({self.backend}, {self.precision}, {specs})"

    def _run(self, batch: Any, arrays: tuple[Any, ...]) -> dict[str, Any]:
        runner = self.open()
        if runner.takes_torch:
            results = runner.run(self._as_tensors(batch, arrays))
        else:
            results = runner.run(as_feeds(batch, self.inputs, "the call"))
        tensor = next((array for array in arrays if isinstance(array, torch.Tensor)), None)
        if tensor is not None:
            return {n: torch.as_tensor(value, device=tensor.device) for n, value in results.items()}
        if runner.takes_torch:
            return {name: value.cpu().numpy() for name, value in results.items()}
        return results

    def _as_tensors(self, batch: Any, arrays: tuple[Any, ...]) -> dict[str, torch.Tensor]:
        """Checks a batch without moving its tensors off their device."""
        named = isinstance(batch, Mapping)
        shapes = tuple(map(_shape_only, arrays))
        checked = dict(zip(batch, shapes, strict=True)) if named else shapes
        names = list(as_feeds(checked, self.inputs, "the call"))
        given = dict(zip(batch if named else names, arrays, strict=True))
        return {name: _as_tensor(given[name]) for name in names}


def _shape_only(value: Any) -> Any:
    """A numpy array of the same shape and dtype that takes no memory."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bfloat16:
        raise InputError("an input is bfloat16; convert it with .float() or .half()")
    try:
        dtype = torch.empty(0, dtype=value.dtype).numpy().dtype
    except TypeError as error:
        raise InputError(f"an input is {value.dtype}, which no engine takes") from error
    return np.broadcast_to(np.zeros((), dtype=dtype), tuple(value.shape))


def _as_tensor(value: Any) -> torch.Tensor:
    """A tensor as it is; an array copied, since torch cannot share every one."""
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))


def check_any_int8(report: LayerReport) -> None:
    """Refuses an INT8 engine in which nothing runs in INT8.

    Raises:
        BuildError: with the reasons of the first layers.
    """
    if report.counts().get("int8"):
        return
    reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in report.not_int8()[:3])
    raise BuildError(
        f"an INT8 engine was asked for and no layer of it would run in INT8 ({reasons}); build "
        "with precision float32 or float16 instead"
    )
