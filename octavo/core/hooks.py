"""Hooks on modules that go when a block ends."""

from __future__ import annotations

from types import TracebackType

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

__all__ = ["Hooked", "any_global_hooks", "has_hooks"]


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


def has_hooks(module: nn.Module) -> bool:
    """Whether something of the caller's runs when the module does."""
    return bool(
        "forward" in vars(module)  # a function that was put in its place
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def any_global_hooks() -> bool:
    """Whether something is called for every module of the process, as profilers have it."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]
