"""Launcher of the Triton kernel: memory orders, tile sizes, grid."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton

from octavo.kernels.common.configs import pieces, power_of_two
from octavo.kernels.common.convolution import new_images
from octavo.kernels.common.triton_launch import end_arguments, end_constants, pointers
from octavo.kernels.depthwise_conv2d.configs import divisor
from octavo.kernels.depthwise_conv2d.triton import by_taps, window_arguments
from octavo.kernels.depthwise_separable_conv2d.configs import candidates, default_config
from octavo.kernels.depthwise_separable_conv2d.reference import Separable
from octavo.kernels.depthwise_separable_conv2d.triton_separable import separable_kernel
from octavo.kernels.dispatch.autotune import best_config

__all__ = ["depthwise_separable_conv2d"]


def depthwise_separable_conv2d(
    x: torch.Tensor,
    dw_weight: torch.Tensor,
    pw_weight: torch.Tensor,
    s: Separable,
    config: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """See `schema.depthwise_separable_conv2d`.

    Args:
        x: [B, C, H, W].
        dw_weight: [C, 1, kh, kw].
        pw_weight: [N, C].
        s: what is done with them.
        config: fields of `default_config`, in its place, for tests.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = new_images(x, len(pw_weight), s.depthwise.window, s.pointwise.out_dtype)
    if out.numel():
        with torch.cuda.device_of(x):
            config = config or _choose(x, dw_weight, pw_weight, out.shape, s)
            _launch(x, by_taps(dw_weight), pw_weight.contiguous(), out, s, config)
    return out


def _choose(
    x: torch.Tensor,
    dw_weight: torch.Tensor,
    pw_weight: torch.Tensor,
    result: torch.Size,
    s: Separable,
) -> Mapping[str, int]:
    """The tuned configuration, or that of the rule."""
    batch, outputs, height, width = result
    facts = (height, width, x.shape[1], outputs, x.element_size())
    window, first, second = s.depthwise.window, s.depthwise.epilogue, s.pointwise
    (kh, kw), (down, across) = window.kernel, window.stride
    return best_config(
        "depthwise_separable_conv2d",
        f"{power_of_two(batch)}x{height}x{width}x{x.shape[1]}x{outputs} "
        f"{kh}x{kw} by {down}x{across} {x.element_size()} {second.out_dtype.itemsize} "
        f"{first.activation} {second.activation} "
        f"{'alone' if second.residual is None else 'residual'}",
        x.device,
        default_config(*facts),
        functools.partial(candidates, *facts),
        functools.partial(depthwise_separable_conv2d, x, dw_weight, pw_weight, s),
    )


def _launch(
    x: torch.Tensor,
    dw_weight: torch.Tensor,
    pw_weight: torch.Tensor,
    out: torch.Tensor,
    s: Separable,
    config: Mapping[str, int],
) -> None:
    """Fills `out` [B, N, H', W'] from x [B, C, H, W], both channels_last.

    dw_weight: [kh, kw, C], and pw_weight [N, C], both contiguous.
    """
    batch, outputs, height, width = out.shape
    count = triton.cdiv(height, config["BLOCK_H"]) * triton.cdiv(width, config["BLOCK_W"])
    grid = (batch * count * triton.cdiv(outputs, config["BLOCK_N"]),)
    window, first = s.depthwise.window, s.depthwise.epilogue
    separable_kernel[grid](
        x, dw_weight, pw_weight, out,
        *pointers(x, first.scale_x, first.scale_w, first.bias, first.out_scale),
        s.depthwise.zero_point,
        first.out_zero_point, *end_arguments(s.pointwise, x), batch * height * width, outputs,
        *window_arguments(x, s.depthwise),
        DW_CHANNEL=first.scale_w is not None and first.scale_w.ndim > 0,
        DW_BIAS=first.bias is not None, DW_ACTIVATION=first.activation,
        **end_constants(s.pointwise), KH=window.kernel[0], KW=window.kernel[1],
        PIECES=pieces(config), UNIT=divisor(x.shape[1]), UNIT_N=divisor(outputs), **config,
    )  # fmt: skip
