"""octavo::int8_conv2d: y = activation(conv2d(x_q, w_q) * scales + bias) + residual."""

from __future__ import annotations

import math

import torch

from octavo.core.errors import InputError
from octavo.kernels.common import onednn
from octavo.kernels.common.configs import power_of_two
from octavo.kernels.common.convolution import (
    Convolution,
    Padding,
    Size2d,
    as_rows,
    check_convolution,
    new_images,
    window_of,
)
from octavo.kernels.common.epilogue import MAX_K, Epilogue, check_alike
from octavo.kernels.dispatch.operator import Operator
from octavo.kernels.dispatch.select import (
    Implementation,
    triton_implementation,
    triton_reason,
)
from octavo.kernels.int8_conv2d import int_mm, reference

__all__ = ["int8_conv2d"]


def int8_conv2d(
    x_q: torch.Tensor,
    w_q: torch.Tensor,
    scale_x: torch.Tensor | None = None,
    scale_w: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    stride: Size2d = 1,
    padding: Padding = 0,
    dilation: Size2d = 1,
    groups: int = 1,
    zero_point: int = 0,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_scale: torch.Tensor | None = None,
    residual_zero_point: int = 0,
    out_dtype: torch.dtype = torch.float16,
    out_scale: torch.Tensor | None = None,
    out_zero_point: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Convolves images of int8 codes.

    Accumulators are int32 and exact: acc = sum(x_q * w_q), where padding holds the code
    `zero_point`. The rest is float32: y = acc * (scale_x * scale_w) + bias, then the activation,
    then the residual, then one rounding to `out_dtype`.

    Codes with a zero point stand for (q - zero_point) * scale_x. The constant that this adds to
    every sum, -zero_point * sum(w_q) * scale_x * scale_w, belongs into `bias`; see
    `octavo.kernels.fold_zero_point`.

    Args:
        x_q: activations, int8 [B, C, H, W]; any strides, fastest in channels_last.
        w_q: weights, int8 [N, C / groups, kh, kw]; fastest in channels_last.
        scale_x: float32 [].
        scale_w: float32 [], or [N] with one scale per output channel.
        bias: as of `int8_gemm`.
        stride: a number or (vertical, horizontal).
        padding: a number, (vertical, horizontal), (left, right, top, bottom), or "same" as in
            `octavo.kernels.common.convolution.make_window`.
        dilation: a number or (vertical, horizontal).
        groups: into which the channels of x and of the result are split.
        zero_point: the code of 0.0 in x_q.
        activation: as of `int8_gemm`, as what follows.
        residual: [B, N, H', W'].
        residual_scale: float32 [].
        residual_zero_point: of a residual of codes.
        out_dtype: of the result.
        out_scale: float32 [].
        out_zero_point: of int8 output.
        backend: "auto", "triton", "onednn" (on CPUs), "int_mm" (torch._int_mm and the epilogue in
            torch) or "reference"; see `octavo.kernels`.

    Returns:
        [B, N, H', W'] of `out_dtype`, channels_last.

    Raises:
        InputError: a wrong dtype, shape or device, or so many products in a sum that int32 could
            overflow.
        UnsupportedError: the backend asked for cannot run this.
    """
    epilogue = Epilogue(
        scale_x, scale_w, bias, as_rows(residual), out_scale,
        activation, out_dtype, residual_scale, out_zero_point, residual_zero_point,
    )  # fmt: skip
    window = window_of(x_q, w_q, stride, padding, dilation)
    convolution = Convolution(window, zero_point, epilogue, groups)
    result: torch.Tensor = OPERATOR(x_q, w_q, convolution, backend=backend)
    return result


def _check(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> None:
    for name, value in (("x_q", x), ("w_q", w)):
        if value.dtype != torch.int8:
            raise InputError(f"{name} is {value.dtype}; int8_conv2d takes int8 codes")
    if x.ndim != 4 or w.ndim != 4:
        raise InputError(
            f"x_q {list(x.shape)} and w_q {list(w.shape)} do not fit; they are [B, C, H, W] "
            "and [N, C / groups, kh, kw]"
        )
    if c.groups < 1 or w.shape[0] % c.groups or x.shape[1] != w.shape[1] * c.groups:
        raise InputError(
            f"x_q {list(x.shape)} and w_q {list(w.shape)} do not fit {c.groups} groups; w_q is "
            "[N, C / groups, kh, kw], and groups divides N"
        )
    if 0 in x.shape[1:] or 0 in w.shape:
        raise InputError(
            f"x_q {list(x.shape)} or w_q {list(w.shape)} is empty; only the batch may be 0"
        )
    products = math.prod(w.shape[1:])
    if products > MAX_K:
        raise InputError(
            f"w_q {list(w.shape)} makes sums of {products} products, and those of more than "
            f"{MAX_K} can overflow int32; split the channels"
        )
    check_alike("w_q", w, x, "x_q", dtype=False)
    check_convolution(x, c, w.shape[0])


def _fake(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> torch.Tensor:
    return new_images(x, w.shape[0], c.window, c.epilogue.out_dtype)


def _triton_reason(x: torch.Tensor, _w: torch.Tensor, c: Convolution) -> str:
    (batch, _, *size), (high, wide) = x.shape, c.window.out_size(*x.shape[2:])
    return triton_reason(x, (8, 0), pixels=max(math.prod(size), batch * high * wide))


def _bucket(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> tuple[object, ...]:
    """What decides which implementation is the fastest."""
    return (
        power_of_two(x.shape[0]),
        *x.shape[1:],
        *w.shape,
        *c.window.stride,
        *c.window.dilation,
        *c.epilogue.kind,
        "last" if x.is_contiguous(memory_format=torch.channels_last) else "strided",
    )


OPERATOR = Operator(
    "int8_conv2d",
    _check,
    (
        triton_implementation("int8_conv2d", _triton_reason),
        Implementation("onednn", onednn.reason, onednn.int8_conv2d),
        Implementation("int_mm", int_mm.reason, int_mm.int8_conv2d),
        Implementation("reference", lambda *_: "", reference.int8_conv2d, "last"),
    ),
    _fake,
    bucket=_bucket,
)
