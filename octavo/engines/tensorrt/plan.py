"""An opened plan: checked against this machine, deserialized, with one context to run it in.

Both runners, on torch and on PyCUDA, run a plan through here.
"""

from __future__ import annotations

from collections.abc import Mapping

from octavo.core.errors import ArtifactError, BuildError, InputError, UnsupportedError
from octavo.core.results import LayerReport
from octavo.engines.artifact import Artifact, Manifest
from octavo.engines.tensorrt.api import TensorRTApi
from octavo.engines.tensorrt.build import PLAN
from octavo.engines.tensorrt.cuda_driver import Gpu
from octavo.engines.tensorrt.layers import parse_layers
from octavo.engines.tensorrt.types import CudaEngine, ExecutionContext, Shape

__all__ = ["Plan", "check_fits"]

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""TensorRT's names of types -> numpy's."""


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
    """A deserialized engine and its context. Not for two threads at once.

    Args:
        api: the library.
        artifact: checked with `check_fits`; the GPU is the current one.
        cuda_graph: let the library record CUDA graphs, where it does that itself.

    Raises:
        ArtifactError: TensorRT cannot read it.
        BuildError: there is not enough GPU memory.
    """

    def __init__(self, api: TensorRTApi, artifact: Artifact, *, cuda_graph: bool = False) -> None:
        self._api = api
        self.manifest = artifact.manifest
        self.input_types = {spec.name: spec.dtype for spec in self.manifest.inputs}
        self.output_types = {spec.name: spec.dtype for spec in self.manifest.outputs}
        self._shapes: dict[str, Shape] = {}
        self._results: dict[str, Shape] = {}
        if PLAN not in artifact.members:
            raise ArtifactError(f"this engine file holds no {PLAN}; build it again")
        self._runtime = api.runtime()
        api.log.take()
        engine = self._runtime.deserialize_cuda_engine(artifact.members[PLAN])
        if engine is None:
            raise ArtifactError(
                f"{api.title} cannot read this engine: {api.log.take()}; build it again"
            )
        self._engine: CudaEngine = engine
        self._check_types()
        self._context: ExecutionContext = api.context(engine, cuda_graph=cuda_graph)

    def check_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Checks shapes of inputs against what the engine was built for.

        Raises:
            InputError: names the input, its shape and the range.
        """
        for spec in self.manifest.inputs:
            low, _, high = self._range(spec.name)
            shape = shapes[spec.name]
            inside = len(shape) == len(low) and all(
                small <= axis <= large for small, axis, large in zip(low, shape, high, strict=True)
            )
            if not inside:
                takes = f"{list(low)}" if low == high else f"{list(low)} to {list(high)}"
                raise InputError(
                    f"input {spec.name!r} has shape {list(shape)}, the engine takes {takes}; "
                    "build it with a profile that covers this shape"
                )

    def set_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Tells the context the shapes of the next run.

        Args:
            shapes: input name -> shape, checked.

        Returns:
            output name -> shape.

        Raises:
            InputError: TensorRT refuses the shapes.
            UnsupportedError: the shape of an output is only known after the run.
        """
        if self._shapes == shapes:
            return self._results
        self._shapes = {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise InputError(
                    f"{self._api.title} refuses shape {list(shape)} of input {name!r}: "
                    f"{self._api.log.take()}"
                )
        results = {name: tuple(self._context.get_tensor_shape(name)) for name in self.output_types}
        for name, shape in results.items():
            if any(axis < 0 for axis in shape):
                raise UnsupportedError(
                    f"the shape {list(shape)} of output {name!r} depends on the data; let the "
                    "model return what comes before it, such as all boxes, and finish in torch"
                )
        self._shapes, self._results = dict(shapes), results
        return results

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
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

    def layers(self) -> LayerReport:
        """What every layer runs in, read from the engine for the shapes that it is tuned for."""
        self.set_shapes({spec.name: self._range(spec.name)[1] for spec in self.manifest.inputs})
        inspector = self._engine.create_engine_inspector()
        # without a context, types in engines with dynamic shapes are "N/A due to dynamic shapes"
        inspector.execution_context = self._context
        text = inspector.get_engine_information(self._api.module.LayerInformationFormat.JSON)
        quantized = self.manifest.precision.startswith("int8")
        return parse_layers(text, self.manifest.reasons, quantized=quantized)

    def release(self) -> None:
        """Frees the context, then the engine, then the runtime."""
        for name in ("_context", "_engine", "_runtime"):
            self.__dict__.pop(name, None)

    def _range(self, name: str) -> tuple[Shape, Shape, Shape]:
        if name in self.manifest.profiles:
            return self.manifest.profiles[name]
        shape = next(spec.shape for spec in self.manifest.inputs if spec.name == name)
        fixed = tuple(axis for axis in shape if isinstance(axis, int))
        return fixed, fixed, fixed

    def _check_types(self) -> None:
        for name, dtype in {**self.input_types, **self.output_types}.items():
            found = DTYPES.get(self._engine.get_tensor_dtype(name).name, "another type")
            if found != dtype:
                raise ArtifactError(
                    f"the engine has {name!r} as {found}, its manifest as {dtype}; build it again"
                )
