"""torch.cuda and pycuda.driver without a GPU: streams, events, graphs and memory, all written down.

Tensors on the 'GPU' are CPU tensors, and GPU memory is memory of this process.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_tensorrt import World


class Stream:
    def __init__(self, world: World, handle: int) -> None:
        self._world, self.cuda_stream = world, handle

    def wait_stream(self, stream: Stream) -> None:
        self._world.calls.append(("wait_stream", self.cuda_stream, stream.cuda_stream))

    def wait_event(self, event: Event) -> None:
        self._world.calls.append(("wait_event", self.cuda_stream))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return self.cuda_stream


class Event:
    def __init__(self, world: World) -> None:
        self._world = world

    def record(self, stream: Stream) -> None:
        self._world.calls.append(("record", stream.cuda_stream))

    def synchronize(self) -> None:
        self._world.calls.append(("synchronize event",))


class CUDAGraph:
    def __init__(self, world: World) -> None:
        self._world = world
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        self._world.calls.append(("replay",))
        for work in self.work:
            work()


class FakeCuda:
    """Stands for the module torch.cuda."""

    def __init__(self, world: World) -> None:
        self._world, self._handle, self._default = world, 0, Stream(world, 0)
        self._current = self._default
        self.available = True

    def is_available(self) -> bool:
        return self.available

    def current_device(self) -> int:
        return 1

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        self._world.calls.append(("device", str(device)))
        yield

    def Stream(self) -> Stream:  # noqa: N802
        self._handle += 100
        return Stream(self._world, self._handle)

    def Event(self) -> Event:  # noqa: N802
        return Event(self._world)

    def CUDAGraph(self) -> CUDAGraph:  # noqa: N802
        return CUDAGraph(self._world)

    def current_stream(self) -> Stream:
        return self._current

    def default_stream(self) -> Stream:
        return self._default

    def is_current_stream_capturing(self) -> bool:
        return self._current.cuda_stream in self._world.capturing

    def synchronize(self) -> None:
        self._world.calls.append(("synchronize",))

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    @contextlib.contextmanager
    def graph(self, graph: CUDAGraph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self._world.calls.append(("capture", stream.cuda_stream))
        self._world.capturing[stream.cuda_stream] = graph.work
        with self.stream(stream):
            yield
        del self._world.capturing[stream.cuda_stream]


class Allocation:
    def __init__(self, driver: FakeDriver, size: int) -> None:
        self.raw = ctypes.create_string_buffer(size)
        self._driver, self._size = driver, size
        driver.allocated += size

    def __int__(self) -> int:
        return ctypes.addressof(self.raw)

    def free(self) -> None:
        self._driver.need_context()
        self._driver.allocated -= self._size


class FakeDriver:
    """Stands for the module pycuda.driver; everything but `init` needs a pushed context."""

    def __init__(self, world: World) -> None:
        self._world, self.pushed, self.allocated, self.retained = world, 0, 0, 0
        self.started = False
        self.Context = SimpleNamespace(pop=self._pop)

    def init(self) -> None:
        self.started = True

    def Device(self, index: int) -> Any:  # noqa: N802
        assert self.started, "init comes first"
        self._world.calls.append(("Device", index))
        return SimpleNamespace(retain_primary_context=self._retain)

    def Stream(self) -> Any:  # noqa: N802
        self.need_context()
        return SimpleNamespace(
            handle=7, synchronize=lambda: self._world.calls.append(("synchronize",))
        )

    def mem_alloc(self, size: int) -> Allocation:
        self.need_context()
        assert size > 0, "the driver refuses to allocate nothing"
        self._world.calls.append(("mem_alloc", size))
        return Allocation(self, size)

    def memcpy_htod_async(self, dest: Allocation, src: np.ndarray, stream: Any) -> None:
        self.need_context()
        assert stream.handle == 7
        assert src.flags.c_contiguous
        ctypes.memmove(int(dest), src.ctypes.data, src.nbytes)

    def memcpy_dtoh_async(self, dest: np.ndarray, src: Allocation, stream: Any) -> None:
        self.need_context()
        assert stream.handle == 7
        ctypes.memmove(dest.ctypes.data, int(src), dest.nbytes)

    def need_context(self) -> None:
        assert self.pushed, "the context is not current"

    def _retain(self) -> Any:
        self.retained += 1
        return SimpleNamespace(push=self._push, detach=self._detach)

    def _push(self) -> None:
        self.pushed += 1

    def _pop(self) -> None:
        self.pushed -= 1

    def _detach(self) -> None:
        self.retained -= 1
