"""Which implementation of an operator runs, and why the others do not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo.core.errors import InputError, UnsupportedError

__all__ = ["Body", "Decision", "explain", "select", "why_not_triton"]


@dataclass(frozen=True)
class Body:
    """One implementation.

    Attributes:
        name: what callers call it.
        why_not: takes the operator's arguments; says why it cannot run them, or nothing.
        run: takes the operator's arguments.
    """

    name: str
    why_not: Callable[..., str]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Decision:
    """Who ran an operator last.

    Attributes:
        operator: its name.
        body: which implementation ran.
        passed_over: implementation -> why it did not.
    """

    operator: str
    body: str
    passed_over: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name} not: {reason}" for name, reason in self.passed_over)
        return f"{self.operator}: {self.body}" + (f" ({reasons})" if reasons else "")


_last: dict[str, Decision] = {}


def select(operator: str, bodies: Sequence[Body], backend: str, *arguments: Any) -> Body:
    """Chooses the implementation for these arguments.

    Args:
        operator: its name, for `explain`.
        bodies: best first; the last one can run everything.
        backend: "auto", or the name of a body, which then runs or is refused.
        *arguments: of the operator.

    Raises:
        InputError: no body has this name.
        UnsupportedError: the body asked for cannot run these arguments; says why.
    """
    if backend != "auto":
        named = [body for body in bodies if body.name == backend]
        if not named:
            raise InputError(
                f"{operator} has no backend {backend!r}; choose from auto, "
                f"{', '.join(body.name for body in bodies)}"
            )
        reason = named[0].why_not(*arguments)
        if reason:
            raise UnsupportedError(
                f"backend {backend!r} of {operator} cannot run this: {reason}; use backend 'auto'"
            )
        _last[operator] = Decision(operator, backend, ())
        return named[0]
    passed_over: list[tuple[str, str]] = []
    for body in bodies:
        reason = body.why_not(*arguments)
        if not reason:
            _last[operator] = Decision(operator, body.name, tuple(passed_over))
            return body
        passed_over.append((body.name, reason))
    raise UnsupportedError(f"nothing can run {operator}: {passed_over}")


def explain(operator: str) -> Decision:
    """Who ran an operator last in this process, and why the others did not.

    Raises:
        InputError: it has not run yet.
    """
    if operator not in _last:
        raise InputError(f"{operator!r} has not run in this process; known: {sorted(_last)}")
    return _last[operator]


def why_not_triton(tensor: torch.Tensor, capability: tuple[int, int] = (7, 0)) -> str:
    """Why a Triton kernel cannot take a tensor, or nothing.

    Args:
        tensor: one of the operator's arguments.
        capability: the least compute capability that the kernel compiles for.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if tensor.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return ""
        return "the tensors are on the CPU, where Triton has no compiler"
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device.type}"
    found = torch.cuda.get_device_capability(tensor.device)
    if found < capability:
        return f"compute capability {found} is below {capability}"
    return ""
