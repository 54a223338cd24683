"""Runs a plan on torch's CUDA tensors, in torch's current stream."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from octavo.core.errors import UnsupportedError
from octavo.engines.artifact import Artifact
from octavo.engines.backend import Shape
from octavo.engines.tensorrt.api import TensorRTApi
from octavo.engines.tensorrt.plan import Plan

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


class TorchRunner(Plan):
    """Runs an engine on the GPU that is torch's current device when it is opened.

    Results are ready in stream order: torch operations that follow in the same stream see them.
    Work is put into the caller's current stream; where that is the default stream, which TensorRT
    would synchronize with, into a stream of the runner's own, before and after which the caller's
    waits.

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
        self._recorded: OrderedDict[tuple[Shape, ...], _Recording] = OrderedDict()
        self._records = cuda_graph and not api.records_graphs
        with self._current():
            self._own: Any = cuda.Stream()
            self._done: Any = cuda.Event()
        super().__init__(api, artifact, cuda_graph=cuda_graph)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """See `Runner`."""
        with self._opened():
            shapes = self._shapes_of(feeds)
            inputs = {name: feeds[name].detach().to(self._device) for name in shapes}
            capturing = cuda.is_current_stream_capturing()
            if self._records and not capturing:
                return self._replay(inputs, shapes)
            inputs = {name: _ready(tensor) for name, tensor in inputs.items()}
            outputs = self._allocate(self._set_shapes(shapes), self._output_types)
            self._enqueue(inputs, outputs, capturing)
            return outputs

    @contextmanager
    def _current(self) -> Iterator[None]:
        with cuda.device(self._device), torch.no_grad():
            yield

    def _free(self) -> None:
        self._done.synchronize()
        self._recorded.clear()

    def _allocate(self, shapes: Mapping[str, Shape], types: Mapping[str, str]) -> Tensors:
        return {
            name: torch.empty(shape, dtype=getattr(torch, types[name]), device=self._device)
            for name, shape in shapes.items()
        }

    def _enqueue(self, inputs: Tensors, outputs: Tensors, capturing: bool) -> None:
        """Puts one run after the caller's work and before what the caller does next."""
        addresses = _addresses(inputs, outputs)
        current = cuda.current_stream()
        if capturing:  # into a graph of the caller, who orders its runs
            self._put(addresses, current.cuda_stream)
            return
        stream = self._own if current == cuda.default_stream() else current
        if stream is not current:
            stream.wait_stream(current)
        stream.wait_event(self._done)  # a context has one scratch memory for the runs of all
        self._put(addresses, stream.cuda_stream)
        self._done.record(stream)
        if stream is not current:
            current.wait_stream(stream)

    def _replay(self, inputs: Tensors, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        key = tuple(shapes.values())
        if key not in self._recorded:
            self._recorded[key] = self._record(inputs, shapes)
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

    def _record(self, inputs: Tensors, shapes: Mapping[str, Shape]) -> _Recording:
        outputs = self._allocate(self._set_shapes(shapes), self._output_types)
        static = self._allocate(shapes, self._input_types)
        for name, tensor in inputs.items():
            static[name].copy_(tensor)
        # TensorRT does what new shapes need in the first run, which must not be recorded
        self._enqueue(static, outputs, capturing=False)
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=self._own, capture_error_mode="thread_local"):
            self._put(_addresses(static, outputs), self._own.cuda_stream)
        return _Recording(graph, static, outputs)


def _gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


def _addresses(inputs: Tensors, outputs: Tensors) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in {**inputs, **outputs}.items()}


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as TensorRT reads it: contiguous and aligned."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
