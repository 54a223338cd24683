"""Operators: one way to validate a call, to choose who runs it, and to show it to torch.

A call is a tuple of tensors, numbers and records (NamedTuples of these). It is validated, and its
implementation chosen, once for each combination of shapes, dtypes, devices and flags; a further
call of that kind costs a look into a dictionary. That holds for calls at which nobody looks. Where
somebody does (torch.compile and torch.export, jit tracing, fake tensors and other modes, tensor
subclasses, functorch, autograd), the call goes through the operator that is registered with torch,
whose schema follows from the annotations of the function that validates.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from octavo.core.errors import UnsupportedError
from octavo.kernels.dispatch.select import Decision, Implementation, asked_backend, record, select
from octavo.kernels.native.library import Library

__all__ = ["Operator", "compiled_inline", "forget_plans", "libraries_of", "wants_gradient"]

MOST_PLANS = 4096
"""Kinds of calls that an operator remembers; models with many lengths of sequences have many."""
Plan = tuple[Callable[..., Any], Decision]
"""What runs a kind of call, and what to tell of it."""
_SIMPLE = {
    torch.Tensor: "Tensor",
    torch.dtype: "ScalarType",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
}


class _Argument(NamedTuple):
    """An argument as torch's schema has it; a record is several, and so are records in a tuple.

    Of records in a tuple the tensors go column by column; what else they have must be the default.
    """

    name: str
    kind: str
    record: Callable[..., Any] | None = None
    fields: tuple[Any, ...] = ()
    several: bool = False


class Operator:
    """`operator(*arguments, backend="auto")`, with implementations to choose from.

    Args:
        name: of the folder, and of `torch.ops.octavo.<name>`.
        check: takes the arguments and raises InputError for what does not fit; its annotations
            are the schema.
        implementations: as of `select`.
        fake: takes the arguments and gives empty tensors like the result.
        returns: the results as a schema has them.
        bucket: takes the arguments; everything that changes which implementation is the fastest
            on a GPU, or None where nothing is to be measured.
        inline: takes the arguments and the backend; what compilers and autograd should see in the
            place of the operator, or None for the operator itself.
        gradient: (backward, setup_context) as of `torch.library.register_autograd`; without it
            a gradient that goes through the operator is an error.
        updated: names of arguments, as the schema has them, that a call writes to.
    """

    def __init__(
        self,
        name: str,
        check: Callable[..., None],
        implementations: Sequence[Implementation],
        fake: Callable[..., Any],
        *,
        returns: str = "Tensor",
        bucket: Callable[..., tuple[object, ...] | None] | None = None,
        inline: Callable[..., Any] | None = None,
        gradient: tuple[Callable[..., Any], Callable[..., None]] | None = None,
        updated: Sequence[str] = (),
    ) -> None:
        self.name, self.implementations, self._writes = name, tuple(implementations), bool(updated)
        self._check, self._bucket, self._inline = check, bucket, inline
        self._plans: dict[tuple[object, ...], Plan] = {}
        _operators[name] = self
        hints = typing.get_type_hints(check)
        hints.pop("return", None)
        self._arguments = tuple(_argument(key, hint) for key, hint in hints.items())
        qualified = f"octavo::{name}"
        torch.library.define(qualified, f"({self._schema(updated)}) -> {returns}")
        torch.library.impl(qualified, "CompositeExplicitAutograd")(self._registered)
        torch.library.register_fake(qualified)(lambda *flat: fake(*self._nested(flat)))
        if gradient is None:
            torch.library.impl(qualified, "Autograd")(self._ungraded)
        else:
            torch.library.register_autograd(qualified, gradient[0], setup_context=gradient[1])
        self.overload = getattr(torch.ops.octavo, name).default

    def __call__(self, *arguments: Any, backend: str = "auto") -> Any:
        """Validates, chooses and runs.

        Raises:
            InputError: see `check`; or no implementation is called `backend`.
            UnsupportedError: the one asked for cannot run this.
        """
        if torch.compiler.is_compiling():
            return self._seen(arguments, backend)
        key = _kind(arguments, backend, self._writes)
        if key is None:
            return self._seen(arguments, backend)
        plan = self._plans.get(key)
        if plan is None:
            self._check(*arguments)
            plan = self._planned(key, arguments, backend)
        run, decision = plan
        record(decision)
        return run(*arguments)

    def flat(self, *arguments: Any) -> list[Any]:
        """The arguments as `torch.ops.octavo` takes them, before the backend."""
        return list(_flattened(self._arguments, arguments))

    def _planned(
        self, key: tuple[object, ...] | None, arguments: Sequence[Any], backend: str
    ) -> Plan:
        x = arguments[0]
        bucket = self._bucket(*arguments) if self._bucket is not None and x.is_cuda else None
        found = select(
            self.name, self.implementations, backend, arguments, device=x.device, bucket=bucket
        )
        plan = found.implementation.run, found.decision
        if key is not None and found.settled:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _seen(self, arguments: Sequence[Any], backend: str) -> Any:
        """The call where somebody looks at operators or at gradients."""
        self._check(*arguments)
        if self._inline is not None:
            found = self._inline(*arguments, backend)
            if found is not None:
                return found
        return self.overload(*_flattened(self._arguments, arguments), backend)

    def _registered(self, *flat: Any) -> Any:
        """What the registered operator does; its arguments were validated where it was called."""
        arguments, backend = self._nested(flat), flat[-1]
        key = _kind(arguments, backend, self._writes)
        plan = None if key is None else self._plans.get(key)
        if plan is None:
            # a program that was exported may be given anything, so nothing is kept unchecked
            self._check(*arguments)
            plan = self._planned(key, arguments, backend)
        run, decision = plan
        record(decision)
        return run(*arguments)

    def _ungraded(self, *flat: Any) -> Any:
        if _kind(flat, "") is not None:
            return self._registered(*flat)
        if torch.is_grad_enabled():
            # autograd looks at tensors, and not into the lists of them
            leaves, form = pytree.tree_flatten(flat)
            if any(isinstance(one, torch.Tensor) and one.requires_grad for one in leaves):
                return _Ungraded.apply(self, form, *leaves)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*flat)

    def _schema(self, updated: Sequence[str]) -> str:
        parts = []
        aliases = iter("abcdefgh")
        for name, kind in _leaves(self._arguments):
            written = f"({next(aliases)}!)" if name in updated else ""
            parts.append(f"{kind[:6]}{written}{kind[6:]} {name}" if written else f"{kind} {name}")
        return ", ".join([*parts, "str backend"])

    def _nested(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments from their flat form."""
        leaves = iter(flat)
        return tuple(_taken(argument, leaves) for argument in self._arguments)


_operators: dict[str, Operator] = {}


def libraries_of(operators: Iterable[str]) -> list[Library]:
    """The C that operators run on a CPU, by their names."""
    found = [one.library for name in operators for one in _operators[name].implementations]
    return [library for library in found if library is not None]


def forget_plans() -> None:
    """Lets every operator validate and choose anew, after something changed who can run."""
    for operator in _operators.values():
        operator._plans.clear()


class _Ungraded(torch.autograd.Function):
    """Runs an operator that has no gradient, and says so when one is asked for."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, form: Any, *leaves: Any) -> Any:
        ctx.name = operator.name
        with torch._C._AutoDispatchBelowAutograd():
            return operator.overload(*pytree.tree_unflatten(leaves, form))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(
            f"octavo::{ctx.name} has no gradient; quantized layers are for inference, so call "
            "the model under torch.no_grad()"
        )


def compiled_inline(tensor: torch.Tensor, backend: str) -> bool:
    """Whether an operator should show the compiler its plain torch instead of itself.

    torch.compile for a CPU fuses the quantization of activations and the epilogue of a product
    with what stands around them, which it cannot do with an operator that it calls whole. An
    exported program keeps the operator, and so does one for a GPU, where a kernel of ours runs.

    Args:
        tensor: one of the operator's arguments.
        backend: that was asked for; one that is named is called whole.
    """
    return (
        backend == "auto"
        and tensor.device.type == "cpu"
        and torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
    )


def wants_gradient(backend: str, *tensors: torch.Tensor | None) -> bool:
    """Whether an operator should be plain torch because a gradient may be asked of it later.

    Args:
        backend: that was asked for; one that is named is called whole, and has no gradient.
        *tensors: that may want one. An exported program keeps the operator.
    """
    return (
        backend == "auto"
        and torch.is_grad_enabled()
        and any(one is not None and one.requires_grad for one in tensors)
        and not torch.compiler.is_exporting()
    )


def _kind(
    arguments: Sequence[Any], backend: str, strided: bool = False
) -> tuple[object, ...] | None:
    """What decides whether a call is valid and who runs it; None where somebody looks.

    A registered operator is needed where something looks at operators or at gradients, and where
    the dispatcher prepares the arguments: tensors without data, or with a sign still to come.
    """
    if not _WATCHERS:
        return None
    for somebody_looks in _WATCHERS:
        if somebody_looks():
            return None
    key: list[object] = [asked_backend() if backend == "auto" else backend]
    seen = _describe(arguments, key, torch.is_grad_enabled(), strided)
    return tuple(key) if seen else None


def _describe(values: Sequence[Any], key: list[object], gradients: bool, strided: bool) -> bool:
    """Adds what decides about some arguments; whether nobody looks at them.

    Strides decide on a GPU, and on a CPU (`strided`) for tensors that are written to.
    """
    for value in values:
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if (gradients and value.requires_grad) or value.is_neg():
                return False
            key += (value.shape, value.dtype, value.device)
            if strided or not value.is_cpu:
                if value.is_meta:
                    return False
                key.append(value.stride())
        elif value is None or kind is str or kind is int:
            key.append(value)
        elif isinstance(value, (tuple, list)):
            key.append(len(value))
            if not _describe(value, key, gradients, strided):
                return False
        elif isinstance(value, torch.Tensor):
            return False
        else:
            key.append(value)
    return True


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


def _argument(name: str, hint: Any) -> _Argument:
    """An argument of the schema from an annotation."""
    if hint in _SIMPLE:
        return _Argument(name, _SIMPLE[hint])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (inner,) = (one for one in typing.get_args(hint) if one is not type(None))
        return _Argument(name, _argument(name, inner).kind + "?")
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if inner is int:
            return _Argument(name, "SymInt[]")
        found = _argument(name, inner)
        columns = tuple(
            one._replace(kind="Tensor[]") for one in found.fields if one.kind.startswith("Tensor")
        )
        return found._replace(fields=columns, several=True)
    hints: Mapping[str, Any] = typing.get_type_hints(hint)
    fields = tuple(_argument(f"{name}_{key}", hints[key]) for key in hint._fields)
    return _Argument(name, "", hint, fields)


def _leaves(arguments: Sequence[_Argument]) -> Iterator[tuple[str, str]]:
    for one in arguments:
        if one.record is None:
            yield one.name, one.kind
        else:
            yield from _leaves(one.fields)


def _flattened(arguments: Sequence[_Argument], values: Sequence[Any]) -> Iterator[Any]:
    for argument, value in zip(arguments, values, strict=True):
        if argument.record is None:
            yield value
        elif argument.several:
            for column in argument.fields:
                field = column.name.removeprefix(f"{argument.name}_")
                every = (getattr(one, field) for one in value)
                yield [one for one in every if one is not None]
        else:
            yield from _flattened(argument.fields, value)


def _taken(argument: _Argument, leaves: Iterator[Any]) -> Any:
    """An argument made of the next leaves."""
    if argument.several:
        names = [column.name.removeprefix(f"{argument.name}_") for column in argument.fields]
        columns = {name: values for name in names if (values := next(leaves))}
        rows = zip(*columns.values(), strict=True)
        return tuple(argument.record(**dict(zip(columns, row, strict=True))) for row in rows)  # type: ignore[misc]
    if argument.record is not None:
        return argument.record(*[_taken(field, leaves) for field in argument.fields])
    value = next(leaves)
    return tuple(value) if argument.kind.endswith("[]") else value
