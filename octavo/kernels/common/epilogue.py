"""What operators do with their sums: scales, bias, activation, residual, and one rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from octavo.core.errors import InputError
from octavo.kernels.common.codes import to_int8

__all__ = [
    "ACTIVATIONS",
    "FLOATS",
    "IN_PLACE",
    "MAX_K",
    "OUTPUTS",
    "Epilogue",
    "check_alike",
    "check_epilogue",
    "check_tensor",
    "check_zero_point",
]


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": lambda y: y.clamp(0, 6),
    "gelu": functional.gelu,
    "gelu-tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
    "hardswish": functional.hardswish,
}
IN_PLACE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu_,
    "relu6": lambda y: y.clamp_(0, 6),
    "gelu": torch.ops.aten.gelu_,
    "gelu-tanh": lambda y: torch.ops.aten.gelu_(y, approximate="tanh"),
    "silu": lambda y: functional.silu(y, inplace=True),
    "hardswish": lambda y: functional.hardswish(y, inplace=True),
}


class Epilogue(NamedTuple):
    """What happens to the accumulators; see `schema.int8_gemm` for the fields.

    Int32 output is the accumulators. Sums of floats, of other operators, have no scales.
    """

    scale_x: torch.Tensor | None
    scale_w: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    out_scale: torch.Tensor | None
    activation: str
    out_dtype: torch.dtype
    residual_scale: torch.Tensor | None = None
    out_zero_point: int = 0
    residual_zero_point: int = 0

    @property
    def kind(self) -> tuple[object, ...]:
        """What decides how long it takes, for keys of measurements."""
        coded = self.residual_scale is not None
        added = "alone" if self.residual is None else "codes" if coded else "residual"
        return self.out_dtype, self.activation, "plain" if self.bias is None else "bias", added

    def __call__(self, accumulator: torch.Tensor) -> torch.Tensor:
        """From accumulators int32 or float32 [..., N] to the result, step by step in float32."""
        if self.out_dtype == torch.int32:
            return accumulator
        # in place: on a CPU new memory costs as much as the arithmetic
        bias = self.bias
        if bias is not None and bias.dtype == torch.int32:
            accumulator, bias = accumulator.to(torch.int32).add_(bias), None
        y = _as_floats(accumulator)
        if self.scale_x is not None and self.scale_w is not None:
            scale_x = self.scale_x.unsqueeze(-1) if self.scale_x.ndim else self.scale_x
            y = y.mul_(scale_x).mul_(self.scale_w)
        if bias is not None:
            y.add_(bias)
        return self.after_bias(y)

    def after_bias(self, y: torch.Tensor) -> torch.Tensor:
        """The rest, from float32 that is no longer needed."""
        y = IN_PLACE[self.activation](y)
        if self.residual is not None:
            residual = self.residual_values(self.residual)
            # a gradient is computed from what an activation gave
            y = y + residual if y.requires_grad else y.add_(residual)
        if self.out_scale is None:
            return y.to(self.out_dtype)
        return to_int8(y, self.out_scale, self.out_zero_point)

    def residual_values(self, residual: torch.Tensor) -> torch.Tensor:
        """What is added: the residual, or what its codes stand for."""
        if self.residual_scale is None:
            return residual
        return residual.float().sub_(self.residual_zero_point).mul_(self.residual_scale)


def _as_floats(accumulator: torch.Tensor) -> torch.Tensor:
    """The same numbers in float32; in the memory of the accumulators where nobody is looking."""
    if accumulator.is_floating_point():
        return accumulator
    if torch.compiler.is_compiling() or accumulator.device.type != "cpu":
        return accumulator.float()
    return accumulator.view(torch.float32).copy_(accumulator)


MAX_K = 2**31 // 128**2 - 1
"""The longest sum of products of two codes that cannot overflow int32."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
OUTPUTS = (*FLOATS, torch.int8, torch.int32)


def check_epilogue(
    e: Epilogue,
    x: torch.Tensor,
    *,
    scales_x: Sequence[tuple[int, ...]],
    n: int,
    result: tuple[int, ...],
    **names: str,
) -> None:
    """Validates what happens to the sums of an operator.

    Args:
        e: the epilogue.
        x: codes, or the floats of another operator, for their device and dtype.
        scales_x: shapes that scale_x may have.
        n: output channels.
        result: shape of the result.
        **names: what callers call fields, where that differs.

    Raises:
        InputError: a wrong dtype, shape or device, or parts that do not belong together.
    """
    floats, numbers = x.is_floating_point(), (torch.float32,)
    tensors: tuple[tuple[str, Sequence[tuple[int, ...]], tuple[torch.dtype, ...]], ...] = (
        ("scale_x", scales_x, numbers),
        ("scale_w", [(), (n,)], numbers),
        ("out_scale", [()], numbers),
        ("residual_scale", [()], numbers),
        ("bias", [(n,)], FLOATS if floats else (*FLOATS, torch.int32)),
        ("residual", [result], (*FLOATS, torch.int8)),
    )
    for field, shapes, dtypes in tensors:
        check_tensor(names.get(field, field), getattr(e, field), shapes, x, dtypes)
    if e.out_dtype not in OUTPUTS:
        raise InputError(f"out_dtype {e.out_dtype} is unknown; use one of {OUTPUTS}")
    if e.activation not in ACTIVATIONS:
        raise InputError(
            f"activation {e.activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}"
        )
    raw = e.out_dtype == torch.int32
    parts = (e.scale_x, e.scale_w, e.bias, e.residual)
    if raw and (e.activation != "none" or any(value is not None for value in parts)):
        raise InputError(
            "int32 output is the accumulators alone; leave scales, bias, activation and residual "
            "out"
        )
    given = [one is not None for one in (e.scale_x, e.scale_w)]
    if floats and (raw or any(given)):
        raise InputError(
            f"scales and int32 output belong to int8 codes, and x is {x.dtype}; leave them out"
        )
    if not (raw or floats or all(given)):
        raise InputError(f"{e.out_dtype} output needs scale_x and scale_w")
    if (e.out_scale is not None) != (e.out_dtype == torch.int8):
        raise InputError("out_scale belongs to int8 output; give both or neither")
    coded = e.residual is not None and e.residual.dtype == torch.int8
    if (e.residual_scale is not None) != coded:
        raise InputError("residual_scale belongs to a residual of int8 codes; give both or neither")
    for field, scale, owner in (
        ("out_zero_point", e.out_scale, "int8 output"),
        ("residual_zero_point", e.residual_scale, "a residual of int8 codes"),
    ):
        owned = owner if scale is None else ""
        check_zero_point(names.get(field, field), getattr(e, field), owned)


def check_zero_point(name: str, value: int, owner: str = "") -> None:
    """A zero point is an int8 code.

    Args:
        name: of the argument.
        value: of it.
        owner: what it belongs to and what is not there, so that it must be 0.

    Raises:
        InputError: it is not.
    """
    if not -128 <= value <= 127:
        raise InputError(f"{name} is {value}; an int8 code is from -128 to 127")
    if value and owner:
        raise InputError(f"{name} is {value} and belongs to {owner}; leave it 0")


def check_tensor(
    name: str,
    value: torch.Tensor | None,
    shapes: Sequence[tuple[int, ...]],
    x: torch.Tensor,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    *,
    x_name: str = "x",
) -> None:
    """An argument, where it is given, has one of these shapes and dtypes, and the device of x.

    Raises:
        InputError: it has another.
    """
    if value is None:
        return
    if tuple(value.shape) not in shapes or value.dtype not in dtypes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        raise InputError(
            f"{name} is {value.dtype} {list(value.shape)}; it must be {kinds} {wanted}"
        )
    check_alike(name, value, x, x_name, dtype=False)


def check_alike(
    name: str, value: torch.Tensor, x: torch.Tensor, x_name: str = "x", *, dtype: bool = True
) -> None:
    """An argument has the device of another one and, where `dtype` asks for it, its dtype.

    Raises:
        InputError: it has another.
    """
    if dtype and value.dtype != x.dtype:
        raise InputError(f"{name} is {value.dtype} and {x_name} {x.dtype}; convert one of them")
    if value.device != x.device:
        raise InputError(
            f"{name} is on {value.device} and {x_name} on {x.device}; move one of them"
        )
