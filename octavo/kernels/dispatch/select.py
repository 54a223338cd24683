"""Which implementation of an operator runs, and why the others do not.

On a CPU an order decides. On a GPU those that can run a call are measured once for each shape
bucket, and the fastest is kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels.dispatch import contest

__all__ = [
    "Body",
    "Decision",
    "asked_backend",
    "explain",
    "is_plain_call",
    "note",
    "run",
    "select",
    "use_backend",
    "why_not_triton",
]


@dataclass(frozen=True)
class Body:
    """One implementation.

    Attributes:
        name: what callers call it.
        why_not: takes the operator's arguments; says why it cannot run them, or nothing.
        run: takes the operator's arguments.
        role: "any" may be chosen by the order and by measuring; "measured" by measuring only;
            "last" where no "any" can run: the oracle, which need not be quick.
    """

    name: str
    why_not: Callable[..., str]
    run: Callable[..., Any]
    role: Literal["any", "measured", "last"] = "any"


@dataclass(frozen=True)
class Decision:
    """Who ran an operator last.

    Attributes:
        operator: its name.
        body: which implementation ran.
        passed_over: implementation -> why it did not.
        microseconds: implementation -> median of one call, where they were measured.
        note: why nothing was measured on a GPU, where that is so.
    """

    operator: str
    body: str
    passed_over: tuple[tuple[str, str], ...] = ()
    microseconds: tuple[tuple[str, float], ...] = ()
    note: str = ""

    def __str__(self) -> str:
        times = dict(self.microseconds)
        text = f"{self.operator}: {self.body}"
        if self.body in times:
            text += f", {times[self.body]:.1f} us"
        slower = [f"{n} took {t:.1f} us" for n, t in times.items() if n != self.body]
        refused = [f"{name} not: {reason}" for name, reason in self.passed_over]
        notes = [f"by rule, not measured: {self.note}"] if self.note else []
        reasons = "; ".join([*slower, *refused, *notes])
        return text + (f" ({reasons})" if reasons else "")


INTERPRETED = "TRITON_INTERPRET=1 is for tests, which ask for it by name"
_last: dict[str, Decision] = {}
_asked: contextvars.ContextVar[str] = contextvars.ContextVar("backend", default="auto")


def select(
    operator: str,
    bodies: Sequence[Body],
    backend: str,
    *arguments: Any,
    device: torch.device | None = None,
    bucket: tuple[object, ...] | None = None,
) -> Body:
    """Chooses the implementation for these arguments.

    Args:
        operator: its name, for `explain`.
        bodies: best first by the rule; one with the role "last" can run everything.
        backend: "auto", or the name of a body, which then runs or is refused.
        *arguments: of the operator.
        device: where the call runs; with it and `bucket` the choice is measured on a GPU.
        bucket: everything that changes which body is the fastest: buckets of the shape, dtypes.

    Raises:
        InputError: no body has this name.
        UnsupportedError: the body asked for cannot run these arguments; says why.
    """
    if backend == "auto":
        backend = asked_backend()
    if backend != "auto":
        return _named(operator, bodies, backend, arguments)
    if device is None or bucket is None or device.type != "cuda":
        return _by_rule(operator, bodies, arguments, "")
    able, passed_over = _candidates(bodies, arguments)
    if len(able) < 2:
        return _by_rule(operator, bodies, arguments, "")
    calls = {body.name: functools.partial(body.run, *arguments) for body in able}
    found = contest.winner(operator, bucket, device, calls)
    if isinstance(found, str):
        return _by_rule(operator, bodies, arguments, found)
    failed = tuple((name, f"failed: {reason}") for name, reason in found.failures)
    _last[operator] = Decision(operator, found.body, (*passed_over, *failed), found.microseconds)
    return next(body for body in able if body.name == found.body)


def run(
    operator: str,
    bodies: Sequence[Body],
    backend: str,
    arguments: Sequence[Any],
    kind: Callable[..., tuple[object, ...] | None] | None = None,
) -> Any:
    """Selects the implementation for these arguments, and runs it.

    Args:
        operator: its name, for `explain`.
        bodies: as of `select`.
        backend: as of `select`.
        arguments: of the bodies; the first is a tensor.
        kind: takes them and gives the bucket of `select`; asked on a GPU only.

    Raises:
        InputError: no body has this name.
        UnsupportedError: the body asked for cannot run these arguments; says why.
    """
    x = arguments[0]
    bucket = kind(*arguments) if kind is not None and x.is_cuda else None
    body = select(operator, bodies, backend, *arguments, device=x.device, bucket=bucket)
    return body.run(*arguments)


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


def _named(operator: str, bodies: Sequence[Body], backend: str, arguments: Sequence[Any]) -> Body:
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
    _last[operator] = Decision(operator, backend)
    return named[0]


def _by_rule(operator: str, bodies: Sequence[Body], arguments: Sequence[Any], note: str) -> Body:
    passed_over: list[tuple[str, str]] = []
    for body in bodies:
        if body.role == "measured":
            continue
        interpreted = body.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        reason = INTERPRETED if interpreted else body.why_not(*arguments)
        if not reason:
            _last[operator] = _by_order(operator, body.name, tuple(passed_over), note)
            return body
        passed_over.append((body.name, reason))
    raise UnsupportedError(f"nothing can run {operator}: {passed_over}")


def _candidates(
    bodies: Sequence[Body], arguments: Sequence[Any]
) -> tuple[list[Body], tuple[tuple[str, str], ...]]:
    """Bodies to measure, best first by the rule; and why the others cannot run this."""
    asked = [(body, body.why_not(*arguments)) for body in bodies]
    able = [body for body, reason in asked if not reason]
    if any(body.role == "any" for body in able):
        able = [body for body in able if body.role != "last"]
    refused = tuple((body.name, reason) for body, reason in asked if reason)
    # the first one gives the result that the others must agree with
    return sorted(able, key=lambda body: body.role == "measured"), refused


def explain(operator: str) -> Decision:
    """Who ran an operator last in this process, and why the others did not.

    Raises:
        InputError: it has not run yet.
    """
    if operator not in _last:
        raise InputError(f"{operator!r} has not run in this process; known: {sorted(_last)}")
    return _last[operator]


def note(operator: str, body: str) -> None:
    """Tells `explain` of a body that a caller ran by itself, without `select`."""
    _last[operator] = _unchosen(operator, body)


@functools.cache
def _unchosen(operator: str, body: str) -> Decision:
    return Decision(operator, body)


@functools.lru_cache(maxsize=256)
def _by_order(
    operator: str, body: str, passed_over: tuple[tuple[str, str], ...], note: str
) -> Decision:
    return Decision(operator, body, passed_over, note=note)


def is_plain_call(*tensors: torch.Tensor | None) -> bool:
    """Whether nobody would see the difference between an operator and its implementation.

    A registered operator costs some tens of microseconds a call, which small products feel. It is
    needed where something looks at operators or at gradients: torch.compile and torch.export,
    jit tracing, fake tensors and other modes, subclasses, functorch, autograd; and where the
    dispatcher prepares the arguments: tensors without data, or with a sign that is still to come.

    Args:
        *tensors: of the call.
    """
    # the first question is one that torch.compile answers without looking at the others
    if torch.compiler.is_compiling() or not _WATCHERS:
        return False
    for somebody_looks in _WATCHERS:
        if somebody_looks():
            return False
    gradients = torch.is_grad_enabled()
    for one in tensors:
        if one is not None and (
            type(one) not in _PLAIN
            or (gradients and one.requires_grad)
            or one.is_meta
            or one.is_neg()
        ):
            return False
    return True


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _watchers() -> tuple[Callable[[], object], ...]:
    """What tells of tracers and modes; nothing where this torch lacks one of these functions.

    They are not public. Without them every call takes the operator, which is right and slower.
    """
    names = (
        (torch._C, "_get_tracing_state"),
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_is_torch_function_mode_enabled"),
        (getattr(torch._C, "_functorch", None), "peek_interpreter_stack"),
    )
    found = [getattr(place, name, None) for place, name in names]
    return tuple(one for one in found if one is not None) if all(found) else ()


_WATCHERS = _watchers()


def why_not_triton(tensor: torch.Tensor, capability: tuple[int, int] = (7, 0)) -> str:
    """Why a Triton kernel cannot take a tensor, or nothing.

    Args:
        tensor: one of the operator's arguments.
        capability: the least compute capability that the kernel compiles for.
    """
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


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
