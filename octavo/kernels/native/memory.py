"""Memory that C on a CPU writes to: results, used again when nobody holds them, and scratch.

glibc's malloc gives large buffers back to the system as soon as they are freed, and each page of
the next one costs a fault, together several milliseconds of an encoder's call. So a few buffers are
kept. A result is a tensor of its own over one of them, and the buffer is free when nothing refers
to its storage: no tensor, view, array or storage object, in any thread.
"""

from __future__ import annotations

import functools
import math
import sys
import threading

import torch

__all__ = ["new_result", "scratch"]

SMALLEST = 1 << 18
"""Bytes below which malloc keeps what is freed."""
MOST = 1 << 26
"""Bytes that are kept in all."""
MOST_SCRATCH = 1 << 22
"""Bytes that a thread keeps."""
_own = threading.local()
_use_count = getattr(torch._C, "_storage_Use_Count", None)
_kept: list[tuple[torch.Tensor, int]] = []
"""Buffers, and where each began."""
_lock = threading.Lock()


def new_result(*shape: int) -> torch.Tensor:
    """A tensor of float32 on the CPU, contiguous, with anything in it."""
    size = 4 * math.prod(shape)
    if not SMALLEST <= size <= MOST or _use_count is None:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    with _lock:
        buffer = _free(size)
        if buffer is None:
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
            _keep(buffer)
        result = torch.empty(0, dtype=torch.float32, device="cpu")
        return result.set_(buffer.untyped_storage(), 0, shape)  # type: ignore[call-overload,no-any-return]


def scratch(count: int) -> torch.Tensor:
    """At least so many float32 on the CPU, in a row, until this thread calls for some again."""
    known: torch.Tensor | None = getattr(_own, "scratch", None)
    if known is not None and known.numel() >= count:
        return known
    made = torch.empty(count, dtype=torch.float32, device="cpu")
    if 4 * count <= MOST_SCRATCH:
        _own.scratch = made
    return made


def _free(size: int) -> torch.Tensor | None:
    """A buffer of this size that nobody uses."""
    # one that was moved to shared memory may be read by another process
    _kept[:] = [(buffer, start) for buffer, start in _kept if buffer.data_ptr() == start]
    return next((b for b, _ in _kept if b.numel() == size and not _is_used(b)), None)


def _references(buffer: torch.Tensor) -> tuple[int, int]:
    """How many refer to a buffer's storage, and to the object that Python sees it by."""
    storage = buffer.untyped_storage()
    return _use_count(storage._cdata), sys.getrefcount(storage)  # type: ignore[misc]


@functools.cache
def _references_of_unused() -> tuple[int, int]:
    return _references(torch.empty(1, device="cpu"))


def _is_used(buffer: torch.Tensor) -> bool:
    return _references(buffer) != _references_of_unused()


def _keep(buffer: torch.Tensor) -> None:
    """Keeps a buffer, and drops those that are not used where there are too many."""
    room = MOST - buffer.numel()
    for one in list(_kept):
        if sum(other.numel() for other, _ in _kept) <= room:
            break
        if not _is_used(one[0]):
            _kept.remove(one)
    if sum(other.numel() for other, _ in _kept) <= room:
        _kept.append((buffer, buffer.data_ptr()))
