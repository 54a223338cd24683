"""Runs a plan through PyCUDA, on numpy arrays, where torch has no CUDA or should stay out."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from octavo.core.arrays import Array
from octavo.core.errors import BuildError, InputError, MissingDependencyError, UnsupportedError
from octavo.core.results import LayerReport
from octavo.engines.artifact import Artifact
from octavo.engines.tensorrt.api import TensorRTApi
from octavo.engines.tensorrt.cuda_driver import current_gpu
from octavo.engines.tensorrt.plan import Plan

__all__ = ["PyCudaRunner"]


class PyCudaRunner:
    """Runs an engine on numpy arrays: copies in, runs, copies out, and waits.

    It works in the GPU's primary context, the one that TensorRT and torch use, with a stream and
    buffers of its own. Several threads may share a runner; their runs follow one another.

    Args:
        api: the library.
        artifact: checked against this machine.
        cuda_graph: not offered by this runner.

    Raises:
        MissingDependencyError: PyCUDA cannot be imported; says why and what to do.
        UnsupportedError: `cuda_graph` was asked for.
        ArtifactError: TensorRT cannot read the engine.
    """

    takes_torch = False

    def __init__(self, api: TensorRTApi, artifact: Artifact, *, cuda_graph: bool = False) -> None:
        if cuda_graph:
            raise UnsupportedError(
                "runner pycuda does not record CUDA graphs; choose runner='torch' or leave "
                "cuda_graph out"
            )
        self._cuda = _import_driver()
        self._lock = threading.Lock()
        self._buffers: dict[str, tuple[Any, int]] = {}
        self._cuda.init()
        gpu = current_gpu()
        self._device_context: Any = self._cuda.Device(
            0 if gpu is None else gpu.index
        ).retain_primary_context()
        try:
            with self._current():
                self._plan: Plan | None = Plan(api, artifact)
                self._stream: Any = self._cuda.Stream()
        except BaseException:
            self._device_context.detach()
            raise

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs the engine.

        Args:
            feeds: input name -> numpy array of the dtype the engine takes.

        Returns:
            output name -> a new array.

        Raises:
            InputError: a dtype or shape that the engine does not take.
            BuildError: the runner is closed, or TensorRT refuses.
        """
        with self._lock:
            plan = self._opened()
            arrays: dict[str, Array] = {}
            for name, dtype in plan.input_types.items():
                if str(feeds[name].dtype) != dtype:
                    raise InputError(f"input {name!r} is {feeds[name].dtype}, not {dtype}")
                # not ascontiguousarray, which gives a scalar an axis
                arrays[name] = np.asarray(feeds[name], order="C")
            plan.check_shapes({name: array.shape for name, array in arrays.items()})
            with self._current():
                return self._run(plan, arrays)

    def layers(self) -> LayerReport:
        """See `Runner`."""
        with self._lock:
            plan = self._opened()
            with self._current():
                return plan.layers()

    def close(self) -> None:
        """Frees the buffers and the engine, and gives the context back; again does no harm."""
        with self._lock:
            if self._plan is None:
                return
            with self._current():
                for buffer, _ in self._buffers.values():
                    buffer.free()
                self._buffers.clear()
                self._plan.release()
                self._plan, self._stream = None, None
            self._device_context.detach()

    def _run(self, plan: Plan, arrays: Mapping[str, Array]) -> dict[str, Any]:
        shapes = plan.set_shapes({name: array.shape for name, array in arrays.items()})
        results = {
            name: np.empty(shape, dtype=plan.output_types[name]) for name, shape in shapes.items()
        }
        buffers = {
            name: self._buffer(name, array.nbytes) for name, array in {**arrays, **results}.items()
        }
        for name, array in arrays.items():
            self._cuda.memcpy_htod_async(buffers[name], array, self._stream)
        addresses = {name: int(buffer) for name, buffer in buffers.items()}
        plan.enqueue(addresses, self._stream.handle)
        for name, array in results.items():
            self._cuda.memcpy_dtoh_async(array, buffers[name], self._stream)
        self._stream.synchronize()
        return dict(results)

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

    def _opened(self) -> Plan:
        if self._plan is None:
            raise BuildError("this runner is closed; load the engine again with octavo.load")
        return self._plan

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Makes the primary context current in this thread while the block runs."""
        self._device_context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()


def _import_driver() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise MissingDependencyError(
            f"runner pycuda needs PyCUDA, which cannot be imported ({error}). It has no wheel: "
            'pip install "octavo[pycuda]" compiles it against the CUDA headers (nvcc or the '
            "package nvidia-cuda-runtime), and it needs an NVIDIA driver to be imported at all"
        ) from error
