"""Launcher of the Triton kernel: memory orders, tile sizes, grid."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton

from octavo.kernels.common.configs import power_of_two
from octavo.kernels.common.convolution import Convolution, new_images
from octavo.kernels.common.triton_launch import end_arguments, end_constants
from octavo.kernels.depthwise_conv2d.configs import candidates, default_config, divisor
from octavo.kernels.depthwise_conv2d.triton_depthwise import depthwise_kernel
from octavo.kernels.dispatch.autotune import best_config

__all__ = ["by_taps", "depthwise_conv2d", "window_arguments"]


def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    c: Convolution,
    config: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """See `schema.depthwise_conv2d`.

    Args:
        x: [B, C, H, W].
        weight: [C, 1, kh, kw].
        c: what is done with them.
        config: fields of `default_config`, in its place, for tests.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = new_images(x, x.shape[1], c.window, c.epilogue.out_dtype)
    if out.numel():
        with torch.cuda.device_of(x):
            _launch(x, by_taps(weight), out, c, config or _choose(x, weight, out.shape, c))
    return out


def by_taps(weight: torch.Tensor) -> torch.Tensor:
    """The weights [C, 1, kh, kw] as [kh, kw, C] in memory; a copy where they are not already."""
    return weight.squeeze(1).permute(1, 2, 0).contiguous()


def window_arguments(x: torch.Tensor, c: Convolution) -> tuple[int, ...]:
    """What kernels take from H to DILATION_W."""
    _, channels, height, width = x.shape
    left, _, top, _ = c.window.padding
    return (
        height, width, channels, *c.window.out_size(height, width),
        top, left, *c.window.stride, *c.window.dilation,
    )  # fmt: skip


def _choose(
    x: torch.Tensor, weight: torch.Tensor, result: torch.Size, c: Convolution
) -> Mapping[str, int]:
    """The tuned configuration, or that of the rule."""
    batch, channels, height, width = result
    facts = (power_of_two(batch), height, width, channels, x.element_size())
    (kh, kw), (down, across), e = c.window.kernel, c.window.stride, c.epilogue
    return best_config(
        "depthwise_conv2d",
        f"{facts[0]}x{height}x{width}x{channels} {kh}x{kw} by {down}x{across} "
        f"{x.element_size()} {e.out_dtype.itemsize} {e.activation}",
        x.device,
        default_config(*facts),
        functools.partial(candidates, *facts),
        functools.partial(depthwise_conv2d, x, weight, c),
    )


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    c: Convolution,
    config: Mapping[str, int],
) -> None:
    """Fills `out` [B, C, H', W'] from x [B, C, H, W], both channels_last, and `by_taps` weights."""
    batch, channels, height, width = out.shape
    count = triton.cdiv(height, config["BLOCK_H"]) * triton.cdiv(width, config["BLOCK_W"])
    grid = (batch * count * triton.cdiv(channels, config["BLOCK_C"]),)
    depthwise_kernel[grid](
        x, weight, out, *end_arguments(c.epilogue, x), c.zero_point,
        batch * height * width, *window_arguments(x, c),
        **end_constants(c.epilogue), KH=c.window.kernel[0], KW=c.window.kernel[1],
        UNIT=divisor(channels), **config,
    )  # fmt: skip
