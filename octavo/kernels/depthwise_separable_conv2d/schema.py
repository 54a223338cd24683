"""octavo::depthwise_separable_conv2d: a depthwise half, a pointwise half, nothing in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.convolution import (
    Convolution,
    Padding,
    Size2d,
    check_zero_point,
    make_window,
    window_of,
)
from octavo.kernels.common.epilogue import FLOATS, MAX_K, Epilogue, check_epilogue, check_tensor
from octavo.kernels.depthwise_conv2d.schema import check_images, kind, result_dtype
from octavo.kernels.depthwise_separable_conv2d import reference, two_kernel
from octavo.kernels.depthwise_separable_conv2d.reference import Separable
from octavo.kernels.dispatch.select import Body, is_plain_call, run, why_not_triton
from octavo.kernels.dispatch.tracing import is_inlined, wants_gradient

__all__ = ["depthwise_separable_conv2d"]

Optional = torch.Tensor | None
NAME = "depthwise_separable_conv2d"


def depthwise_separable_conv2d(
    x: torch.Tensor,
    dw_weight: torch.Tensor,
    dw_bias: torch.Tensor | None,
    pw_weight: torch.Tensor,
    pw_bias: torch.Tensor | None,
    *,
    stride: Size2d = 1,
    padding: Padding = 0,
    dilation: Size2d = 1,
    dw_activation: str = "none",
    pw_activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_scale: torch.Tensor | None = None,
    residual_zero_point: int = 0,
    scale_x: torch.Tensor | None = None,
    dw_scale: torch.Tensor | None = None,
    mid_scale: torch.Tensor | None = None,
    pw_scale: torch.Tensor | None = None,
    zero_point: int = 0,
    mid_zero_point: int = 0,
    out_dtype: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
    out_zero_point: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Convolves each channel with a kernel of its own, then mixes the channels of each pixel.

    The depthwise half gives activation(sums + bias), rounded to x's dtype; or, from codes, the
    codes of that under `mid_scale` and `mid_zero_point`. The pointwise half sums over these in
    float32, or exactly in int32, then adds the bias, applies its activation, adds the residual
    and rounds once.

    Zero points are not subtracted: padding holds the one of x, and the constants belong into the
    biases, -zero_point * sum(dw_weight) * scale_x * dw_scale into `dw_bias` and
    -mid_zero_point * sum(pw_weight) * mid_scale * pw_scale into `pw_bias`.

    Where a gradient is wanted and no backend is named, torch's own operators compute the result.

    Args:
        x: float16, bfloat16, float32 or int8 codes [B, C, H, W]; any memory format, channels_last
            without a copy.
        dw_weight: of x's dtype [C, 1, kh, kw]; see `depthwise_conv2d`.
        dw_bias: floating [C]; a BatchNorm is folded into weight and bias beforehand. For codes
            also int32 [C], which is added to the sums.
        pw_weight: of x's dtype [N, C] or [N, C, 1, 1].
        pw_bias: floating [N]; for codes also int32 [N].
        stride: a number or (vertical, horizontal).
        padding: as of `depthwise_conv2d`.
        dilation: a number or (vertical, horizontal).
        dw_activation: of the depthwise half; as of `depthwise_conv2d`.
        pw_activation: of the pointwise half.
        residual: [B, N, H', W'], added after the last activation; floating, or int8 codes.
        residual_scale: float32 [], for a residual of codes.
        residual_zero_point: of a residual of codes.
        scale_x: float32 [], of codes.
        dw_scale: float32 [] or [C], of the depthwise weights.
        mid_scale: float32 [], of the codes between the halves.
        pw_scale: float32 [] or [N], of the pointwise weights.
        zero_point: of the codes x, which padding holds.
        mid_zero_point: of the codes between the halves.
        out_dtype: as of `depthwise_conv2d`; int32 is the sums of the pointwise half, which take
            no pw_scale, pw_bias, activation or residual.
        out_scale: float32 [], of int8 output.
        out_zero_point: of int8 output.
        backend: "auto", "triton" (one kernel), "two-kernel" or "reference"; one that is named
            runs or is refused. On a GPU "auto" measures those that can run, once for each shape
            bucket, and keeps the fastest; see `octavo.kernels.explain`.

    Returns:
        [B, N, H', W'] of `out_dtype`, channels_last.

    Raises:
        InputError: a wrong dtype, shape, device or number.
        UnsupportedError: the backend asked for cannot run this.
    """
    check_images(x, dw_weight)
    check_zero_point(x, zero_point)
    window = make_window(dw_weight.shape[2:], x.shape[2:], stride, padding, dilation)
    pw_weight = _check_weights(x, pw_weight)
    dtype = result_dtype(x, out_dtype, out_scale)
    scales = {"scale_x": scale_x, "dw_scale": dw_scale, "mid_scale": mid_scale}
    _check_middle(x, scales, mid_zero_point)
    size = window.out_size(x.shape[2], x.shape[3])
    shape = (x.shape[0], pw_weight.shape[0], *size)
    check_tensor("residual", residual, [shape], x, (*FLOATS, torch.int8))
    tensors = (
        x, dw_weight, dw_bias, pw_weight, pw_bias, residual,
        scale_x, dw_scale, mid_scale, pw_scale, out_scale, residual_scale,
    )  # fmt: skip
    numbers = (
        window.stride, window.padding, window.dilation, dw_activation, pw_activation,
        zero_point, mid_zero_point, out_zero_point, residual_zero_point, dtype,
    )  # fmt: skip
    bound = _bind(*tensors, *numbers)
    _check_halves(x, bound[-1], shape)
    inlined = is_inlined(x, backend)
    if inlined or wants_gradient(backend, x, dw_weight, dw_bias, pw_weight, pw_bias, residual):
        return two_kernel.depthwise_separable_conv2d(*bound)
    call = _run if is_plain_call(*tensors) else torch.ops.octavo.depthwise_separable_conv2d
    result: torch.Tensor = call(*tensors, *numbers, backend)
    return result


def _check_weights(x: torch.Tensor, pw_weight: torch.Tensor) -> torch.Tensor:
    """The pointwise weights [N, C]."""
    channels = x.shape[1]
    shape = tuple(pw_weight.shape)
    fits = len(shape) == 2 or (len(shape) == 4 and shape[2] == shape[3] == 1)
    if not fits or shape[1] != channels or not shape[0]:
        raise InputError(
            f"pw_weight {list(shape)} does not fit; it is [N, {channels}] or [N, {channels}, 1, 1]"
        )
    if pw_weight.dtype != x.dtype:
        raise InputError(f"pw_weight is {pw_weight.dtype} and x {x.dtype}; convert one of them")
    if pw_weight.device != x.device:
        raise InputError(f"pw_weight is on {pw_weight.device} and x on {x.device}; move one")
    if not x.is_floating_point() and channels > MAX_K:
        raise InputError(f"sums over {channels} channels can overflow int32; {MAX_K} is the most")
    return pw_weight.reshape(shape[:2])


def _check_middle(x: torch.Tensor, scales: dict[str, Optional], mid_zero_point: int) -> None:
    """Codes have all scales up to the middle, floats have none of them."""
    if not -128 <= mid_zero_point <= 127:
        raise InputError(f"mid_zero_point is {mid_zero_point}; an int8 code is from -128 to 127")
    names = ", ".join(scales)
    if not x.is_floating_point():
        if None in scales.values():
            raise InputError(f"int8 codes need {names}; give all of them")
    elif mid_zero_point or any(scale is not None for scale in scales.values()):
        raise InputError(
            f"{names} and mid_zero_point belong to int8 codes, and x is {x.dtype}; leave them out"
        )


def _check_halves(
    x: torch.Tensor,
    s: Separable,
    shape: tuple[int, ...],
) -> None:
    """Bias, scales, activation and result of both halves."""
    first, second = s.depthwise.epilogue, s.pointwise
    batch, n, height, width = shape
    channels = x.shape[1]
    check_tensor("dw_scale", first.scale_w, [(), (channels,)], x, (torch.float32,))
    check_tensor("mid_scale", first.out_scale, [()], x, (torch.float32,))
    check_tensor("pw_scale", second.scale_w, [(), (n,)], x, (torch.float32,))
    kinds = FLOATS if x.is_floating_point() else (*FLOATS, torch.int32)
    check_tensor("dw_bias", first.bias, [(channels,)], x, kinds)
    check_tensor("pw_bias", second.bias, [(n,)], x, kinds)
    check_epilogue(first, x, scales_x=[()], n=channels, result=())
    check_epilogue(second, x, scales_x=[()], n=n, result=(batch, height, width, n))


def _bind(
    x: torch.Tensor,
    dw_weight: torch.Tensor,
    dw_bias: Optional,
    pw_weight: torch.Tensor,
    pw_bias: Optional,
    residual: Optional,
    scale_x: Optional,
    dw_scale: Optional,
    mid_scale: Optional,
    pw_scale: Optional,
    out_scale: Optional,
    residual_scale: Optional,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dw_activation: str,
    pw_activation: str,
    zero_point: int,
    mid_zero_point: int,
    out_zero_point: int,
    residual_zero_point: int,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Separable]:
    """What bodies take, from the arguments of the registered operator."""
    first = Epilogue(
        scale_x, dw_scale, dw_bias, None, mid_scale, dw_activation, x.dtype,
        out_zero_point=mid_zero_point,
    )  # fmt: skip
    second = Epilogue(
        None if out_dtype == torch.int32 else mid_scale,
        pw_scale,
        pw_bias,
        None if residual is None else residual.permute(0, 2, 3, 1),
        out_scale,
        pw_activation,
        out_dtype,
        residual_scale,
        out_zero_point,
        residual_zero_point,
    )
    window = window_of(dw_weight, stride, padding, dilation)
    s = Separable(Convolution(window, zero_point, first), second)
    return x, dw_weight, pw_weight, s


def _run(*arguments: Any) -> torch.Tensor:
    *given, backend = arguments
    result: torch.Tensor = run(NAME, _BODIES, backend, _bind(*given), _kind)
    return result


_operator = torch.library.custom_op(
    f"octavo::{NAME}",
    _run,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor dw_weight, Tensor? dw_bias, Tensor pw_weight, Tensor? pw_bias, "
        "Tensor? residual, Tensor? scale_x, Tensor? dw_scale, Tensor? mid_scale, "
        "Tensor? pw_scale, Tensor? out_scale, Tensor? residual_scale, "
        "SymInt[] stride, SymInt[] padding, SymInt[] dilation, str dw_activation, "
        "str pw_activation, int zero_point, int mid_zero_point, int out_zero_point, "
        "int residual_zero_point, ScalarType out_dtype, str backend) -> Tensor"
    ),
)


@_operator.register_fake
def _fake(*arguments: Any) -> torch.Tensor:
    x, _, pw_weight, s = _bind(*arguments[:-1])
    return torch.empty(
        (x.shape[0], pw_weight.shape[0], *s.depthwise.window.out_size(x.shape[2], x.shape[3])),
        dtype=s.pointwise.out_dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _triton(
    x: torch.Tensor, dw_weight: torch.Tensor, pw_weight: torch.Tensor, s: Separable
) -> torch.Tensor:
    from octavo.kernels.depthwise_separable_conv2d import triton

    result: torch.Tensor = triton.depthwise_separable_conv2d(x, dw_weight, pw_weight, s)
    return result


def _kind(
    x: torch.Tensor, dw_weight: torch.Tensor, pw_weight: torch.Tensor, s: Separable
) -> tuple[object, ...]:
    """What decides which body is the fastest."""
    return (
        *kind(x, dw_weight, s.depthwise),
        pw_weight.shape[0],
        str(s.pointwise.out_dtype).removeprefix("torch."),
        s.pointwise.activation,
        "residual" if s.pointwise.residual is not None else "alone",
    )


_BODIES = (
    Body("triton", lambda x, *_: why_not_triton(x, (8, 0)), _triton),
    Body("two-kernel", lambda *_: "", two_kernel.depthwise_separable_conv2d),
    Body("reference", lambda *_: "", reference.depthwise_separable_conv2d, "last"),
)
