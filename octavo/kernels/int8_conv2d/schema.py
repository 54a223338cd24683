"""octavo::int8_conv2d: y = activation(conv2d(x_q, w_q) * scales + bias) + residual."""

from __future__ import annotations

import math

import torch

from octavo.core.errors import InputError
from octavo.kernels.common import onednn
from octavo.kernels.common.convolution import (
    Convolution,
    Padding,
    Size2d,
    as_images,
    as_rows,
    check_zero_point,
    window_of,
)
from octavo.kernels.common.epilogue import (
    FLOATS,
    MAX_K,
    MOST_ROWS,
    Epilogue,
    check_epilogue,
    check_tensor,
)
from octavo.kernels.dispatch.autotune import size_bucket
from octavo.kernels.dispatch.operator import Operator
from octavo.kernels.dispatch.select import Implementation, triton_reason
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
        scale_w: float32 [] or, a scale an output channel, [N].
        bias: floating [N], added after scaling; or int32 [N], added to the accumulators, as
            INT8 engines do it.
        stride: a number for both directions, or (vertical, horizontal).
        padding: a number, (vertical, horizontal), (left, right, top, bottom), or "same" as in
            `octavo.kernels.common.convolution.make_window`.
        dilation: a number for both directions, or (vertical, horizontal).
        groups: into which the channels of x and of the result are split.
        zero_point: the code of 0.0 in x_q.
        activation: "none", "relu", "relu6", "gelu", "gelu-tanh", "silu" or "hardswish".
        residual: added after the activation [B, N, H', W']; floating, or int8 codes.
        residual_scale: float32 [], for a residual of codes.
        residual_zero_point: of a residual of codes.
        out_dtype: float16, bfloat16 or float32; int8 for codes under `out_scale`; int32 for the
            accumulators alone, which take no scales, bias, activation or residual.
        out_scale: float32 [], for int8 output.
        out_zero_point: the code of 0.0 in int8 output.
        backend: "auto", "triton", "onednn" (on CPUs), "int_mm" (torch._int_mm and the epilogue in
            torch) or "reference"; one that is named runs or is refused. On a GPU "auto" measures
            those that can run, once for each shape bucket, and keeps the fastest; see
            `octavo.kernels.explain`.

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
    if w.device != x.device:
        raise InputError(f"w_q is on {w.device} and x_q on {x.device}; move one of them")
    check_zero_point(x, c.zero_point)
    n, size = w.shape[0], c.window.out_size(*x.shape[2:])
    if c.epilogue.residual is not None:
        residual, wanted = as_images(c.epilogue.residual), (x.shape[0], n, *size)
        check_tensor("residual", residual, [wanted], x, (*FLOATS, torch.int8))
    check_epilogue(c.epilogue, x, scales_x=[()], n=n, result=(x.shape[0], *size, n))


def _fake(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> torch.Tensor:
    shape = (x.shape[0], *c.window.out_size(*x.shape[2:]), w.shape[0])
    return x.new_empty(shape, dtype=c.epilogue.out_dtype).permute(0, 3, 1, 2)


def _triton(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> torch.Tensor:
    from octavo.kernels.int8_conv2d import triton

    return triton.int8_conv2d(x, w, c)


def _triton_reason(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> str:
    """Why the kernel, whose rows are pixels, cannot make this convolution, or nothing."""
    _, _, height, width = x.shape
    if max(height * width, x.shape[0] * math.prod(c.window.out_size(height, width))) > MOST_ROWS:
        return f"it counts up to {MOST_ROWS} pixels"
    return triton_reason(x, (8, 0))


def _bucket(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> tuple[object, ...]:
    """What decides which implementation is the fastest."""
    e, last = c.epilogue, torch.channels_last
    return (
        size_bucket(x.shape[0]),
        *x.shape[1:],
        *w.shape,
        *c.window.stride,
        *c.window.dilation,
        str(e.out_dtype).removeprefix("torch."),
        e.activation,
        "alone" if e.residual is None else "residual" if e.residual_scale is None else "codes",
        "last" if x.is_contiguous(memory_format=last) else "strided",
    )


OPERATOR = Operator(
    "int8_conv2d",
    _check,
    (
        Implementation("triton", _triton_reason, _triton),
        Implementation("onednn", onednn.reason, onednn.int8_conv2d),
        Implementation("int_mm", int_mm.reason, int_mm.int8_conv2d),
        Implementation("reference", lambda *_: "", reference.int8_conv2d, "last"),
    ),
    _fake,
    bucket=_bucket,
)
