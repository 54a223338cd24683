"""Runs a plan on torch's CUDA tensors, in torch's current stream."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.core.errors import BuildError, InputError, UnsupportedError
from octavo.core.results import LayerReport
from octavo.engines.artifact import Artifact
from octavo.engines.tensorrt.api import TensorRTApi
from octavo.engines.tensorrt.plan import Plan
from octavo.engines.tensorrt.types import Shape

__all__ = ["TorchRunner"]

ALIGNMENT = 256
"""TensorRT wants addresses that are multiples of this; a slice of a tensor may have others."""
MAX_GRAPHS = 16
"""Recorded CUDA graphs are kept for this many shapes of inputs; each holds its own buffers."""

Tensors = dict[str, torch.Tensor]

cuda: Any = torch.cuda
"""Its streams, events and graphs carry no types."""


@dataclass
class _Recording:
    """A CUDA graph with the buffers that it reads and writes."""

    graph: Any
    inputs: Tensors
    outputs: Tensors


class TorchRunner:
    """Runs an engine on the GPU that is torch's current device when it is opened.

    Results are ready in stream order: torch operations that follow in the same stream see them.
    Work is put into the caller's current stream; where that is the default stream, which TensorRT
    would synchronize with, into a stream of the runner's own, before and after which the caller's
    waits. Several threads may share a runner; their runs follow one another.

    Args:
        api: the library.
        artifact: checked against this machine.
        cuda_graph: record a CUDA graph for each shape of the inputs and replay it from then on.
            Launching costs less, inputs and outputs are copied once more.

    Raises:
        UnsupportedError: this torch has no CUDA.
        ArtifactError: TensorRT cannot read the engine.
    """

    takes_torch = True

    def __init__(self, api: TensorRTApi, artifact: Artifact, *, cuda_graph: bool = False) -> None:
        if not cuda.is_available():
            raise UnsupportedError(
                "runner torch needs a build of torch with CUDA and a GPU; install one from "
                "pytorch.org, or choose runner='pycuda'"
            )
        self._device = _gpu(cuda.current_device())
        self._lock = threading.Lock()
        self._recorded: OrderedDict[tuple[Shape, ...], _Recording] = OrderedDict()
        with cuda.device(self._device):
            self._own: Any = cuda.Stream()
            self._done: Any = cuda.Event()
            self._plan: Plan | None = Plan(api, artifact, cuda_graph=cuda_graph)
        self._records = cuda_graph and not api.records_graphs

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs the engine.

        Args:
            feeds: input name -> tensor on any device, of the dtype the engine takes.

        Returns:
            output name -> a new tensor on the engine's GPU.

        Raises:
            InputError: a dtype or shape that the engine does not take.
            BuildError: the runner is closed, or TensorRT refuses.
        """
        with self._lock, cuda.device(self._device), torch.no_grad():
            plan = self._opened()
            for name, dtype in plan.input_types.items():
                if feeds[name].dtype != getattr(torch, dtype):
                    raise InputError(f"input {name!r} is {feeds[name].dtype}, not torch.{dtype}")
            shapes = {name: tuple(feeds[name].shape) for name in plan.input_types}
            plan.check_shapes(shapes)
            inputs = {name: feeds[name].detach().to(self._device) for name in plan.input_types}
            capturing = cuda.is_current_stream_capturing()
            if self._records and not capturing:
                return self._replay(plan, inputs, shapes)
            inputs = {name: _ready(tensor) for name, tensor in inputs.items()}
            outputs = self._allocate(plan.set_shapes(shapes), plan.output_types)
            self._enqueue(plan, inputs, outputs, capturing)
            return {**outputs}

    def layers(self) -> LayerReport:
        """See `Runner`."""
        with self._lock, cuda.device(self._device):
            return self._opened().layers()

    def close(self) -> None:
        """Waits for the last run and frees the engine; more than one call does no harm."""
        with self._lock:
            if self._plan is None:
                return
            with cuda.device(self._device):
                self._done.synchronize()
                self._recorded.clear()
                self._plan.release()
            self._plan = None

    def _opened(self) -> Plan:
        if self._plan is None:
            raise BuildError("this runner is closed; load the engine again with octavo.load")
        return self._plan

    def _allocate(self, shapes: Mapping[str, Shape], types: Mapping[str, str]) -> Tensors:
        return {
            name: torch.empty(shape, dtype=getattr(torch, types[name]), device=self._device)
            for name, shape in shapes.items()
        }

    def _enqueue(self, plan: Plan, inputs: Tensors, outputs: Tensors, capturing: bool) -> None:
        """Puts one run after the caller's work and before what the caller does next."""
        tensors = {**inputs, **outputs}
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        current = cuda.current_stream()
        if capturing:  # into a graph of the caller, who orders its runs
            plan.enqueue(addresses, current.cuda_stream)
            return
        stream = self._own if current == cuda.default_stream() else current
        if stream is not current:
            stream.wait_stream(current)
        stream.wait_event(self._done)  # a context has one scratch memory for the runs of all
        plan.enqueue(addresses, stream.cuda_stream)
        self._done.record(stream)
        if stream is not current:
            current.wait_stream(stream)

    def _replay(self, plan: Plan, inputs: Tensors, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        key = tuple(shapes.values())
        if key not in self._recorded:
            self._recorded[key] = self._record(plan, inputs, shapes)
            if len(self._recorded) > MAX_GRAPHS:
                self._done.synchronize()
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        recording = self._recorded[key]
        stream = cuda.current_stream()
        stream.wait_event(self._done)
        for name, tensor in inputs.items():
            recording.inputs[name].copy_(tensor)
        recording.graph.replay()
        results = {name: tensor.clone() for name, tensor in recording.outputs.items()}
        self._done.record(stream)
        return results

    def _record(self, plan: Plan, inputs: Tensors, shapes: Mapping[str, Shape]) -> _Recording:
        static = self._allocate(shapes, plan.input_types)
        outputs = self._allocate(plan.set_shapes(shapes), plan.output_types)
        for name, tensor in inputs.items():
            static[name].copy_(tensor)
        # TensorRT does what new shapes need in the first run, which must not be recorded
        self._enqueue(plan, static, outputs, capturing=False)
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        addresses = {name: tensor.data_ptr() for name, tensor in {**static, **outputs}.items()}
        with cuda.graph(graph, stream=self._own, capture_error_mode="thread_local"):
            plan.enqueue(addresses, self._own.cuda_stream)
        return _Recording(graph, static, outputs)


def _gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as TensorRT reads it: contiguous and aligned."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
