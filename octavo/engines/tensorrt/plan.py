"""An opened plan: checked against this machine, deserialized, with one context to run it in.

Both runners, on torch and on PyCUDA, are plans that know how to bring data to the GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from octavo.core.errors import ArtifactError, BuildError, InputError, UnsupportedError
from octavo.core.results import LayerReport
from octavo.engines.artifact import Artifact, Manifest
from octavo.engines.backend import Shape
from octavo.engines.tensorrt.api import TensorRTApi
from octavo.engines.tensorrt.build import DTYPES, PLAN
from octavo.engines.tensorrt.cuda_driver import Gpu
from octavo.engines.tensorrt.layers import parse_layers

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Plan", "check_fits"]


def check_fits(manifest: Manifest, api: TensorRTApi, gpu: Gpu | None) -> None:
    """Checks that an engine is for this library and this GPU, before anything of it is read.

    Raises:
        UnsupportedError: there is no GPU here.
        ArtifactError: says what does not match and what to do.
    """
    built = f"this engine was built by {api.title} {manifest.backend_version}"
    if manifest.backend != api.name:
        raise ArtifactError(f"this engine is for backend {manifest.backend}, not {api.name}")
    if gpu is None:
        raise UnsupportedError(
            f"this engine needs an NVIDIA GPU ({', '.join(manifest.architecture)}) and its "
            "driver, and there is none here that is usable; run it on such a machine"
        )
    if manifest.backend_version != api.version:
        raise ArtifactError(
            f"{built}, and {api.version} is installed, which cannot read it; build it again, or "
            f"install version {manifest.backend_version}"
        )
    if gpu.architecture not in manifest.architecture:
        raise ArtifactError(
            f"{built} for {', '.join(manifest.architecture)}, and this machine's {gpu.name} is "
            f"{gpu.architecture}; build it again for {gpu.architecture}"
        )
    if manifest.device not in (None, gpu.name):
        raise ArtifactError(
            f"{built} on a {manifest.device} and is tied to that model, and this machine has a "
            f"{gpu.name}; build it again here"
        )


class Plan:
    """A deserialized engine and its context. Threads may share it, and wait for one another.

    Args:
        api: the library.
        artifact: checked with `check_fits`; the GPU is the current one.
        cuda_graph: let the library record CUDA graphs, where it does that itself.

    Raises:
        ArtifactError: TensorRT cannot read it.
        BuildError: there is not enough GPU memory.
    """

    takes_torch = False

    def __init__(self, api: TensorRTApi, artifact: Artifact, *, cuda_graph: bool = False) -> None:
        self._api = api
        self._manifest = artifact.manifest
        self._input_types = {spec.name: spec.dtype for spec in self._manifest.inputs}
        self._output_types = {spec.name: spec.dtype for spec in self._manifest.outputs}
        self._shapes: dict[str, Shape] = {}
        self._results: dict[str, Shape] = {}
        self._lock = threading.Lock()
        self._closed = False
        if PLAN not in artifact.members:
            raise ArtifactError(f"this engine file holds no {PLAN}; build it again")
        with self._current():
            self._runtime = api.runtime()
            api.log.take()
            engine = self._runtime.deserialize_cuda_engine(artifact.members[PLAN])
            if engine is None:
                raise ArtifactError(
                    f"{api.title} cannot read this engine: {api.log.take()}; build it again"
                )
            self._engine: trt.ICudaEngine = engine
            self._check_types()
            self._context = api.context(engine, cuda_graph=cuda_graph)

    def layers(self) -> LayerReport:
        """What every layer runs in, read from the engine for the shapes that it is tuned for."""
        with self._opened():
            self._set_shapes({name: self._range(name)[1] for name in self._input_types})
            inspector = self._engine.create_engine_inspector()
            # without a context, types in engines with dynamic shapes are "N/A"
            inspector.execution_context = self._context
            text = inspector.get_engine_information(self._api.module.LayerInformationFormat.JSON)
        quantized = self._manifest.precision.startswith("int8")
        return parse_layers(text, self._manifest.reasons, quantized=quantized)

    def close(self) -> None:
        """Waits for the last run and frees everything; more than one call does no harm."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with self._current():
                self._free()
                del self._context, self._engine, self._runtime  # in this order
            self._leave()

    def _current(self) -> AbstractContextManager[None]:
        """Makes the GPU current in this thread while a block runs."""
        return nullcontext()

    def _free(self) -> None:
        """Waits for the last run and frees what a runner holds besides the engine."""

    def _leave(self) -> None:
        """Gives the GPU back."""

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Lets one thread at a time use the engine.

        Raises:
            BuildError: it is closed.
        """
        with self._lock:
            if self._closed:
                raise BuildError("this runner is closed; load the engine again with octavo.load")
            with self._current():
                yield

    def _shapes_of(self, feeds: Mapping[str, Any]) -> dict[str, Shape]:
        """The shapes of arrays or tensors.

        Raises:
            InputError: a dtype that the engine does not take.
        """
        module = "torch." if self.takes_torch else ""
        for name, dtype in self._input_types.items():
            if str(feeds[name].dtype) != module + dtype:
                raise InputError(f"input {name!r} is {feeds[name].dtype}, not {module}{dtype}")
        return {name: tuple(feeds[name].shape) for name in self._input_types}

    def _set_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Tells the context the shapes of the next run.

        Args:
            shapes: input name -> shape.

        Returns:
            output name -> shape.

        Raises:
            InputError: a shape that the engine was not built for; names the input and the range.
            UnsupportedError: the shape of an output is only known after the run.
        """
        if self._shapes == shapes:
            return self._results
        for name, shape in shapes.items():
            low, _, high = self._range(name)
            inside = len(shape) == len(low) and all(
                small <= axis <= large for small, axis, large in zip(low, shape, high, strict=True)
            )
            if not inside:
                takes = f"{list(low)}" if low == high else f"{list(low)} to {list(high)}"
                raise InputError(
                    f"input {name!r} has shape {list(shape)}, the engine takes {takes}; "
                    "build it with a profile that covers this shape"
                )
        self._shapes = {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise InputError(
                    f"{self._api.title} refuses shape {list(shape)} of input {name!r}: "
                    f"{self._api.log.take()}"
                )
        results = {name: tuple(self._context.get_tensor_shape(name)) for name in self._output_types}
        for name, shape in results.items():
            if any(axis < 0 for axis in shape):
                raise UnsupportedError(
                    f"the shape {list(shape)} of output {name!r} depends on the data; let the "
                    "model return what comes before it, such as all boxes, and finish in torch"
                )
        self._shapes, self._results = dict(shapes), results
        return results

    def _put(self, addresses: Mapping[str, int], stream: int) -> None:
        """Puts one run into a CUDA stream and returns at once.

        Args:
            addresses: name of every input and output -> device address, aligned to 256 bytes; the
                memory has to stay until the stream has come past the run.
            stream: handle of the stream.

        Raises:
            BuildError: TensorRT refuses.
        """
        bound = all(
            self._context.set_tensor_address(name, address) for name, address in addresses.items()
        )
        if not bound or not self._context.execute_async_v3(stream):
            raise BuildError(f"{self._api.title} cannot run the engine: {self._api.log.take()}")

    def _range(self, name: str) -> tuple[Shape, Shape, Shape]:
        if name in self._manifest.profiles:
            return self._manifest.profiles[name]
        shape = next(spec.shape for spec in self._manifest.inputs if spec.name == name)
        fixed = tuple(axis for axis in shape if isinstance(axis, int))
        return fixed, fixed, fixed

    def _check_types(self) -> None:
        for name, dtype in {**self._input_types, **self._output_types}.items():
            found = DTYPES.get(self._engine.get_tensor_dtype(name).name, "another type")
            if found != dtype:
                raise ArtifactError(
                    f"the engine has {name!r} as {found}, its manifest as {dtype}; build it again"
                )
