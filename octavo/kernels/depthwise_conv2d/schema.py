"""octavo::depthwise_conv2d: y = activation(depthwise(x, weight) * scales + bias)."""

from __future__ import annotations

import torch

from octavo.core.errors import InputError
from octavo.kernels.common import onednn
from octavo.kernels.common.configs import power_of_two
from octavo.kernels.common.convolution import (
    Convolution,
    Padding,
    Size2d,
    check_convolution,
    new_images,
    window_of,
)
from octavo.kernels.common.epilogue import FLOATS, Epilogue, check_alike
from octavo.kernels.depthwise_conv2d import conv2d, reference
from octavo.kernels.dispatch.operator import Operator, compiled_inline, wants_gradient
from octavo.kernels.dispatch.select import Implementation, triton_implementation

__all__ = ["bucket", "check_images", "depthwise_conv1d", "depthwise_conv2d", "result_dtype"]

DTYPES = (*FLOATS, torch.int8)


def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Size2d = 1,
    padding: Padding = 0,
    dilation: Size2d = 1,
    activation: str = "none",
    scale_x: torch.Tensor | None = None,
    scale_w: torch.Tensor | None = None,
    zero_point: int = 0,
    out_dtype: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
    out_zero_point: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Convolves each channel with a kernel of its own.

    Floats are added up in float32 and rounded once, at the end. Codes are added up exactly in
    int32, then y = sum * scale_x * scale_w + bias in float32, the activation, and one rounding.

    A zero point is not subtracted from the codes: padding holds it, so that every window sums
    over all taps, and the constant -zero_point * sum(w_q) * scale_x * scale_w belongs into `bias`.

    Where a gradient is wanted and no backend is named, torch's own operators compute the result.

    Args:
        x: float16, bfloat16, float32 or int8 codes [B, C, H, W]; any memory format, channels_last
            without a copy.
        weight: of x's dtype [C, 1, kh, kw]; on a GPU without a copy where a channel's neighbour
            in memory is the next channel, see `by_taps`.
        bias: floating [C]; a BatchNorm is folded into weight and bias beforehand. For codes also
            int32 [C], which is added to the sums.
        stride: a number or (vertical, horizontal).
        padding: a number, (vertical, horizontal), (left, right, top, bottom), or "same" as in
            `octavo.kernels.common.convolution.make_window`.
        dilation: a number or (vertical, horizontal).
        activation: as of `int8_gemm`.
        scale_x: float32 [], of codes.
        scale_w: float32 [], or [C] with one scale per channel.
        zero_point: of the codes x, which padding holds.
        out_dtype: float16, bfloat16 or float32; int8 for codes under `out_scale`; int32 for the
            sums of codes alone, which take no scales, bias or activation. None: int8 where
            `out_scale` is given, else the dtype of float x, else float32.
        out_scale: float32 [], of int8 output.
        out_zero_point: of int8 output.
        backend: "auto", "triton", "onednn" (codes on a CPU; results of codes may be one apart),
            "conv2d" (torch's convolution) or "reference"; see `octavo.kernels`.

    Returns:
        [B, C, H', W'] of `out_dtype`, channels_last.

    Raises:
        InputError: a wrong dtype, shape, device or number.
        UnsupportedError: the backend asked for cannot run this.
    """
    dtype = result_dtype(x, out_dtype, out_scale)
    epilogue = Epilogue(
        scale_x, scale_w, bias, None, out_scale, activation, dtype, out_zero_point=out_zero_point
    )
    window = window_of(x, weight, stride, padding, dilation)
    convolution = Convolution(window, zero_point, epilogue, weight.shape[0] if weight.ndim else 0)
    result: torch.Tensor = OPERATOR(x, weight, convolution, backend=backend)
    return result


def depthwise_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | str | tuple[int, int] = 0,
    dilation: int = 1,
    **options: object,
) -> torch.Tensor:
    """Convolves sequences as images of one row; see `depthwise_conv2d`, also for `options`.

    Args:
        x: [B, C, L]; without a copy where it is a view of [B, L, C].
        weight: [C, 1, k].
        bias: floating [C].
        stride: steps from a window to the next.
        padding: a number for both ends, (before, after), or "same".
        dilation: steps from a tap to the next.
        **options: the other arguments of `depthwise_conv2d`.

    Returns:
        [B, C, L'], a view of [B, L', C].

    Raises:
        InputError: as `depthwise_conv2d`; or a shape that is not a sequence's.
        UnsupportedError: the backend asked for cannot run this.
    """
    if x.ndim != 3 or weight.ndim != 3:
        raise InputError(
            f"x {list(x.shape)} and weight {list(weight.shape)} do not fit; they are [B, C, L] "
            "and [C, 1, k]"
        )
    around: Padding = padding if isinstance(padding, str) else (0, 0)
    if isinstance(padding, int):
        around = (padding, padding, 0, 0)
    elif not isinstance(padding, str):
        around = (*padding, 0, 0)
    return depthwise_conv2d(
        x.unsqueeze(2),
        weight.unsqueeze(2),
        bias,
        stride=(1, stride),
        padding=around,
        dilation=(1, dilation),
        **options,  # type: ignore[arg-type]
    ).squeeze(2)


def check_images(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Images and depthwise weights that fit; see `depthwise_conv2d`.

    Raises:
        InputError: they do not.
    """
    if x.dtype not in DTYPES:
        raise InputError(f"x is {x.dtype}; it must be one of {DTYPES}")
    if x.ndim != 4 or weight.ndim != 4 or tuple(weight.shape[:2]) != (x.shape[1], 1):
        raise InputError(
            f"x {list(x.shape)} and weight {list(weight.shape)} do not fit; they are [B, C, H, W] "
            "and [C, 1, kh, kw]"
        )
    if 0 in x.shape[1:] or 0 in weight.shape:
        raise InputError(
            f"x {list(x.shape)} or weight {list(weight.shape)} is empty; only the batch may be 0"
        )
    check_alike("weight", weight, x)


def result_dtype(
    x: torch.Tensor, asked: torch.dtype | None, out_scale: torch.Tensor | None
) -> torch.dtype:
    """The dtype of the result; see `depthwise_conv2d`."""
    if asked is not None:
        return asked
    if out_scale is not None:
        return torch.int8
    return x.dtype if x.is_floating_point() else torch.float32


def _check(x: torch.Tensor, weight: torch.Tensor, c: Convolution) -> None:
    check_images(x, weight)
    check_convolution(x, c, x.shape[1])


def _inline(
    x: torch.Tensor, weight: torch.Tensor, c: Convolution, backend: str
) -> torch.Tensor | None:
    inlined = compiled_inline(x, backend) or wants_gradient(backend, x, weight, c.epilogue.bias)
    if not inlined or conv2d.reason(x, weight, c):
        return None
    return conv2d.depthwise_conv2d(x, weight, c)


def _fake(x: torch.Tensor, _weight: torch.Tensor, c: Convolution) -> torch.Tensor:
    return new_images(x, x.shape[1], c.window, c.epilogue.out_dtype)


def bucket(x: torch.Tensor, _weight: torch.Tensor, c: Convolution) -> tuple[object, ...]:
    """What decides which implementation is the fastest."""
    return (
        power_of_two(x.shape[0]),
        *x.shape[1:],
        x.dtype,
        *c.window.kernel,
        *c.window.stride,
        *c.window.dilation,
        "symmetric" if c.window.symmetric else "asymmetric",
        *c.epilogue.kind,
        "last" if x.is_contiguous(memory_format=torch.channels_last) else "first",
    )


def _onednn_reason(x: torch.Tensor, weight: torch.Tensor, c: Convolution) -> str:
    if x.is_floating_point():
        return "oneDNN's convolution is here for codes"
    return onednn.reason(x, weight, c)


OPERATOR = Operator(
    "depthwise_conv2d",
    _check,
    (
        triton_implementation("depthwise_conv2d"),
        Implementation("onednn", _onednn_reason, onednn.int8_conv2d),
        Implementation("conv2d", conv2d.reason, conv2d.depthwise_conv2d),
        Implementation("reference", lambda *_: "", reference.depthwise_conv2d, "last"),
    ),
    _fake,
    bucket=bucket,
    inline=_inline,
)
