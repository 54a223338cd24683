"""Which implementation of an operator runs, and the reasons why the others do not.

On a CPU an order decides. On a GPU those that can run a call are measured once for each shape
bucket, and the fastest is kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels.dispatch.autotune import fastest
from octavo.kernels.native.library import Library

__all__ = [
    "Choice",
    "Decision",
    "Implementation",
    "asked_backend",
    "explain",
    "record",
    "select",
    "triton_implementation",
    "triton_reason",
    "use_backend",
]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        name: what callers call it.
        reason: takes the operator's arguments; says why it cannot run them, or nothing. It looks
            at shapes, dtypes, devices and flags, never at values.
        run: takes the operator's arguments.
        role: "any" may be chosen by the order and by measuring; "measured" by measuring only;
            "last" where no "any" can run: the oracle, which need not be quick; "composed" likewise,
            and where `use_backend` names an implementation of the operators that it calls.
        library: the C that it runs.
    """

    name: str
    reason: Callable[..., str]
    run: Callable[..., Any]
    role: Literal["any", "measured", "last", "composed"] = "any"
    library: Library | None = None


@dataclass(frozen=True)
class Decision:
    """Who ran an operator last.

    Attributes:
        operator: its name.
        implementation: the one that ran.
        reasons: implementation -> why it did not run.
        microseconds: implementation -> median of one call, where they were measured.
        unmeasured: why nothing was measured on a GPU, where that is so.
    """

    operator: str
    implementation: str
    reasons: tuple[tuple[str, str], ...] = ()
    microseconds: tuple[tuple[str, float], ...] = ()
    unmeasured: str = ""

    def __str__(self) -> str:
        times, ran = dict(self.microseconds), self.implementation
        text = f"{self.operator}: {ran}"
        if ran in times:
            text += f", {times[ran]:.1f} us"
        slower = [f"{n} took {t:.1f} us" for n, t in times.items() if n != ran]
        others = [f"{name} not: {reason}" for name, reason in self.reasons]
        rule = [f"by rule, not measured: {self.unmeasured}"] if self.unmeasured else []
        text_of_others = "; ".join([*slower, *others, *rule])
        return text + (f" ({text_of_others})" if text_of_others else "")


class Choice(NamedTuple):
    """What `select` found.

    Attributes:
        implementation: the one to run.
        decision: what to tell of it.
        settled: whether the next call of the same kind would find the same.
    """

    implementation: Implementation
    decision: Decision
    settled: bool = True


MOST_ROWS = 2**31 - 2**8
"""Rows of a result that int32 counts, with a tile beyond the last one."""
INTERPRETED = "TRITON_INTERPRET=1 is for tests, which ask for it by name"
_last: dict[str, Decision] = {}
_asked: contextvars.ContextVar[str] = contextvars.ContextVar("backend", default="auto")


def select(
    operator: str,
    implementations: Sequence[Implementation],
    backend: str,
    arguments: Sequence[Any],
    *,
    device: torch.device | None = None,
    bucket: tuple[object, ...] | None = None,
) -> Choice:
    """Chooses the implementation for these arguments.

    Args:
        operator: its name.
        implementations: best first by the rule; one with the role "last" can run everything.
        backend: "auto", or the name of an implementation, which then runs or is refused.
        arguments: of the operator.
        device: where the call runs; with it and `bucket` the choice is measured on a GPU.
        bucket: everything that changes which one is the fastest: buckets of the shape, dtypes.

    Raises:
        InputError: no implementation has this name.
        UnsupportedError: the one asked for cannot run these arguments; says why.
    """
    if backend == "auto":
        backend = asked_backend()
        last = implementations[-1]
        if last.role == "composed" and backend not in ("auto", *(i.name for i in implementations)):
            return Choice(last, Decision(operator, last.name))  # it asks others for that backend
    if backend != "auto":
        return _named(operator, implementations, backend, arguments)
    if device is None or bucket is None or device.type != "cuda":
        return _by_rule(operator, implementations, arguments)
    able, reasons = _candidates(implementations, arguments)
    if len(able) < 2:
        return _by_rule(operator, implementations, arguments)
    named = {one.name: one for one in able}
    # what can run depends on more than the bucket: torch._int_mm wants sizes in eights
    words = (str(one).removeprefix("torch.") for one in bucket)
    found = fastest(
        operator,
        "implementations",
        f"{'-'.join(words)} of {', '.join(named)}",
        device,
        lambda: {name: name for name in named},
        lambda name: named[name].run(*arguments),
        named.__contains__,
    )
    if isinstance(found, str):
        return _by_rule(operator, implementations, arguments, found)
    failed = tuple((name, f"failed: {reason}") for name, reason in found.failures)
    decision = Decision(operator, found.chosen, (*reasons, *failed), found.microseconds)
    return Choice(named[found.chosen], decision)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, operators that are called with backend "auto" take this one, or raise.

    "reference" makes layers compute with the exact reference. It holds for the calls of this
    thread, not for what torch.compile has compiled before.

    Args:
        backend: name of a backend that every operator called has, such as "reference".
    """
    token = _asked.set(backend)
    try:
        yield
    finally:
        _asked.reset(token)


def asked_backend() -> str:
    """The backend of calls that name none; see `use_backend`."""
    return _asked.get()


def explain(operator: str) -> Decision:
    """Who ran an operator last in this process, and why the others did not.

    Raises:
        InputError: it has not run yet.
    """
    if operator not in _last:
        raise InputError(f"{operator!r} has not run in this process; known: {sorted(_last)}")
    return _last[operator]


def record(decision: Decision) -> None:
    """Keeps a decision for `explain`."""
    _last[decision.operator] = decision


def triton_reason(
    tensor: torch.Tensor, capability: tuple[int, int] = (7, 0), **counted: int
) -> str:
    """Why a Triton kernel cannot take a tensor, or nothing.

    Args:
        tensor: one of the operator's arguments.
        capability: the least compute capability that the kernel compiles for.
        **counted: rows or pixels of a call that the kernel counts in int32.
    """
    for name, count in counted.items():
        if count > MOST_ROWS:
            return f"it counts up to {MOST_ROWS} {name}"
    if not _triton_is_installed():
        return "triton is not installed"
    device = tensor.device
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return ""
        return "the tensors are on the CPU, where Triton has no compiler"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    found = _capability(device)
    if found < capability:
        return f"compute capability {found} is below {capability}"
    return ""


def triton_implementation(
    operator: str,
    reason: Callable[..., str] = lambda x, *_: triton_reason(x, (8, 0)),
    folder: str = "",
) -> Implementation:
    """An operator's kernels: its function in triton.py, which is imported with the first call.

    Args:
        operator: name of that function.
        reason: as of `Implementation`.
        folder: of the operator, where it has another name.
    """

    def run(*arguments: Any) -> Any:
        module = importlib.import_module(f"octavo.kernels.{folder or operator}.triton")
        return getattr(module, operator)(*arguments)

    return Implementation("triton", reason, run)


def _named(
    operator: str, implementations: Sequence[Implementation], backend: str, arguments: Sequence[Any]
) -> Choice:
    named = [one for one in implementations if one.name == backend]
    if not named:
        raise InputError(
            f"{operator} has no backend {backend!r}; choose from auto, "
            f"{', '.join(one.name for one in implementations)}"
        )
    reason = named[0].reason(*arguments)
    if reason:
        raise UnsupportedError(
            f"backend {backend!r} of {operator} cannot run this: {reason}; use backend 'auto'"
        )
    return Choice(named[0], Decision(operator, backend))


def _by_rule(
    operator: str,
    implementations: Sequence[Implementation],
    arguments: Sequence[Any],
    unmeasured: str = "",
) -> Choice:
    reasons: list[tuple[str, str]] = []
    for one in implementations:
        if one.role == "measured":
            continue
        interpreted = one.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        reason = INTERPRETED if interpreted else one.reason(*arguments)
        if not reason:
            decision = Decision(operator, one.name, tuple(reasons), unmeasured=unmeasured)
            return Choice(one, decision, settled=not unmeasured)
        reasons.append((one.name, reason))
    raise UnsupportedError(f"nothing can run {operator}: {reasons}")


def _candidates(
    implementations: Sequence[Implementation], arguments: Sequence[Any]
) -> tuple[list[Implementation], tuple[tuple[str, str], ...]]:
    """Those to measure, best first by the rule; and why the others cannot run this."""
    asked = [(one, one.reason(*arguments)) for one in implementations]
    able = [one for one, reason in asked if not reason]
    if any(one.role == "any" for one in able):
        able = [one for one in able if one.role in ("any", "measured")]
    reasons = tuple((one.name, reason) for one, reason in asked if reason)
    # the first one gives the result that the others must agree with
    return sorted(able, key=lambda one: one.role == "measured"), reasons


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
