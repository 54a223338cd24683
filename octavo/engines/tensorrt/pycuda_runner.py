"""Runs a plan through PyCUDA, on numpy arrays, where torch has no CUDA or should stay out."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from octavo.core.errors import MissingDependencyError, UnsupportedError
from octavo.engines.artifact import Artifact
from octavo.engines.tensorrt.api import TensorRTApi
from octavo.engines.tensorrt.cuda_driver import current_gpu
from octavo.engines.tensorrt.plan import Plan

__all__ = ["PyCudaRunner"]


class PyCudaRunner(Plan):
    """Runs an engine on numpy arrays: copies in, runs, copies out, and waits.

    It works in the GPU's primary context, the one that TensorRT and torch use, with a stream and
    buffers of its own.

    Args:
        api: the library.
        artifact: checked against this machine.
        cuda_graph: not offered by this runner.

    Raises:
        MissingDependencyError: PyCUDA cannot be imported; says why and what to do.
        UnsupportedError: `cuda_graph` was asked for.
        ArtifactError: TensorRT cannot read the engine.
    """

    def __init__(self, api: TensorRTApi, artifact: Artifact, *, cuda_graph: bool = False) -> None:
        if cuda_graph:
            raise UnsupportedError(
                "runner pycuda does not record CUDA graphs; choose runner='torch' or leave "
                "cuda_graph out"
            )
        try:
            self._cuda: Any = importlib.import_module("pycuda.driver")
        except ImportError as error:
            raise MissingDependencyError(
                f"runner pycuda needs PyCUDA, which cannot be imported ({error}). It has no wheel: "
                'pip install "octavo[pycuda]" compiles it against the CUDA headers (nvcc or the '
                "package nvidia-cuda-runtime), and it needs an NVIDIA driver to be imported at all"
            ) from error
        self._buffers: dict[str, tuple[Any, int]] = {}
        self._cuda.init()
        gpu = current_gpu()
        device = self._cuda.Device(0 if gpu is None else gpu.index)
        self._device_context: Any = device.retain_primary_context()
        try:
            super().__init__(api, artifact)
            with self._current():
                self._stream: Any = self._cuda.Stream()
        except BaseException:
            self._device_context.detach()
            raise

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """See `Runner`."""
        with self._opened():
            shapes = self._set_shapes(self._shapes_of(feeds))
            # not ascontiguousarray, which gives a scalar an axis
            arrays = {name: np.asarray(feeds[name], order="C") for name in self._input_types}
            results: dict[str, Any] = {
                name: np.empty(shape, dtype=self._output_types[name])
                for name, shape in shapes.items()
            }
            buffers = {
                name: self._buffer(name, array.nbytes)
                for name, array in {**arrays, **results}.items()
            }
            for name, array in arrays.items():
                self._cuda.memcpy_htod_async(buffers[name], array, self._stream)
            addresses = {name: int(buffer) for name, buffer in buffers.items()}
            self._put(addresses, self._stream.handle)
            for name, array in results.items():
                self._cuda.memcpy_dtoh_async(array, buffers[name], self._stream)
            self._stream.synchronize()
            return results

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._device_context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def _free(self) -> None:
        for buffer, _ in self._buffers.values():
            buffer.free()
        self._buffers.clear()
        self._stream = None

    def _leave(self) -> None:
        self._device_context.detach()

    def _buffer(self, name: str, size: int) -> Any:
        """GPU memory for a tensor, kept between runs and replaced when it has to grow."""
        buffer, room = self._buffers.get(name, (None, 0))
        if buffer is None or room < size:
            if buffer is not None:
                del self._buffers[name]
                buffer.free()
            buffer = self._cuda.mem_alloc(max(1, size))
            self._buffers[name] = (buffer, size)
        return buffer
