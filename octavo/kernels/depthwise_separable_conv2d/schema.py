"""octavo::depthwise_separable_conv2d: a depthwise half, a pointwise half, nothing in between."""

from __future__ import annotations

import torch

from octavo.core.errors import InputError
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
from octavo.kernels.depthwise_conv2d.schema import bucket, check_images, result_dtype
from octavo.kernels.depthwise_separable_conv2d import reference, two_kernel
from octavo.kernels.depthwise_separable_conv2d.reference import Separable
from octavo.kernels.dispatch.operator import Operator, compiled_inline, wants_gradient
from octavo.kernels.dispatch.select import Implementation, triton_implementation

__all__ = ["depthwise_separable_conv2d"]


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
        x: as of `depthwise_conv2d`, [B, C, H, W].
        dw_weight: likewise, [C, 1, kh, kw].
        dw_bias: likewise, [C].
        pw_weight: of x's dtype [N, C] or [N, C, 1, 1].
        pw_bias: floating [N]; for codes also int32 [N].
        stride: as of `depthwise_conv2d`.
        padding: likewise.
        dilation: likewise.
        dw_activation: of the depthwise half; as of `int8_gemm`.
        pw_activation: of the pointwise half.
        residual: [B, N, H', W'], added after the last activation; floating, or int8 codes.
        residual_scale: as of `int8_gemm`.
        residual_zero_point: likewise.
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
        backend: "auto", "triton" (one kernel), "two-kernel" or "reference"; see `octavo.kernels`.

    Returns:
        [B, N, H', W'] of `out_dtype`, channels_last.

    Raises:
        InputError: a wrong dtype, shape, device or number.
        UnsupportedError: the backend asked for cannot run this.
    """
    dtype = result_dtype(x, out_dtype, out_scale)
    first = Epilogue(
        scale_x, dw_scale, dw_bias, None, mid_scale, dw_activation, x.dtype,
        out_zero_point=mid_zero_point,
    )  # fmt: skip
    second = Epilogue(
        None if dtype == torch.int32 else mid_scale,
        pw_scale,
        pw_bias,
        as_rows(residual),
        out_scale,
        pw_activation,
        dtype,
        residual_scale,
        out_zero_point,
        residual_zero_point,
    )
    if pw_weight.ndim == 4 and pw_weight.shape[2:] == (1, 1):
        pw_weight = pw_weight.flatten(1)
    window = window_of(x, dw_weight, stride, padding, dilation)
    halves = Separable(
        Convolution(window, zero_point, first, dw_weight.shape[0] if dw_weight.ndim else 0), second
    )
    result: torch.Tensor = OPERATOR(x, dw_weight, pw_weight, halves, backend=backend)
    return result


def _check(x: torch.Tensor, dw_weight: torch.Tensor, pw_weight: torch.Tensor, s: Separable) -> None:
    check_images(x, dw_weight)
    channels = x.shape[1]
    if pw_weight.ndim != 2 or pw_weight.shape[1] != channels or not len(pw_weight):
        raise InputError(
            f"pw_weight {list(pw_weight.shape)} does not fit; it is [N, {channels}] or "
            f"[N, {channels}, 1, 1]"
        )
    check_alike("pw_weight", pw_weight, x)
    if not x.is_floating_point() and channels > MAX_K:
        raise InputError(f"sums over {channels} channels can overflow int32; {MAX_K} is the most")
    first, zero_point = s.depthwise.epilogue, s.depthwise.epilogue.out_zero_point
    # quantized values have all scales up to the middle, floats have none of them
    scales, names = (first.scale_x, first.scale_w, first.out_scale), "scale_x, dw_scale, mid_scale"
    if not x.is_floating_point():
        if any(scale is None for scale in scales):
            raise InputError(f"int8 codes need {names}; give all of them")
    elif zero_point or any(scale is not None for scale in scales):
        raise InputError(
            f"{names} and mid_zero_point belong to int8 codes, and x is {x.dtype}; leave them out"
        )
    check_convolution(
        x,
        s.depthwise,
        channels,
        scale_w="dw_scale",
        bias="dw_bias",
        out_scale="mid_scale",
        out_zero_point="mid_zero_point",
    )
    second = s.depthwise._replace(epilogue=s.pointwise)
    check_convolution(
        x, second, len(pw_weight), scale_x="mid_scale", scale_w="pw_scale", bias="pw_bias"
    )


def _inline(
    x: torch.Tensor, dw_weight: torch.Tensor, pw_weight: torch.Tensor, s: Separable, backend: str
) -> torch.Tensor | None:
    first, second = s.depthwise.epilogue, s.pointwise
    floats = (x, dw_weight, first.bias, pw_weight, second.bias, second.residual)
    if compiled_inline(x, backend) or wants_gradient(backend, *floats):
        return two_kernel.depthwise_separable_conv2d(x, dw_weight, pw_weight, s)
    return None


def _fake(
    x: torch.Tensor, _dw_weight: torch.Tensor, pw_weight: torch.Tensor, s: Separable
) -> torch.Tensor:
    return new_images(x, pw_weight.shape[0], s.depthwise.window, s.pointwise.out_dtype)


def _bucket(
    x: torch.Tensor, dw_weight: torch.Tensor, pw_weight: torch.Tensor, s: Separable
) -> tuple[object, ...]:
    """What decides which implementation is the fastest."""
    return *bucket(x, dw_weight, s.depthwise), pw_weight.shape[0], *s.pointwise.kind


OPERATOR = Operator(
    "depthwise_separable_conv2d",
    _check,
    (
        triton_implementation("depthwise_separable_conv2d"),
        Implementation("two-kernel", lambda *_: "", two_kernel.depthwise_separable_conv2d),
        Implementation("reference", lambda *_: "", reference.depthwise_separable_conv2d, "last"),
    ),
    _fake,
    bucket=_bucket,
    inline=_inline,
)
