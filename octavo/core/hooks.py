"""Hooks on modules that go when a block ends."""

from __future__ import annotations

from types import TracebackType

from torch.utils.hooks import RemovableHandle

__all__ = ["Hooked"]


class Hooked:
    """A context manager that puts hooks on modules; what it puts on is up to its `__enter__`.

    The hooks are removed when the block ends, also when it ends with an exception.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
