"""Launcher of the Triton kernel: memory orders, tile sizes, grid."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
import triton

from octavo.kernels.common.convolution import Convolution
from octavo.kernels.common.triton_launch import end_arguments, end_constants
from octavo.kernels.depthwise_conv2d.configs import candidates, default_config, divisor
from octavo.kernels.depthwise_conv2d.triton_depthwise import depthwise_kernel
from octavo.kernels.dispatch.autotune import best_config, size_bucket

__all__ = ["by_taps", "depthwise_conv2d", "window_arguments"]

_rule = functools.lru_cache(maxsize=4096)(default_config)


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
    size = c.window.out_size(x.shape[2], x.shape[3])
    out = torch.empty(
        (*x.shape[:2], *size),
        dtype=c.epilogue.out_dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if out.numel():
        with torch.cuda.device_of(x):
            weight = by_taps(weight)
            _launch(x, weight, out, c, _choose(x, weight, out, c) if config is None else config)
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
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, c: Convolution
) -> Mapping[str, int]:
    """The tuned configuration, or that of the rule."""
    batch, channels, height, width = out.shape
    shape = (size_bucket(batch), height, width, channels, x.element_size())
    (kh, kw), (down, across) = c.window.kernel, c.window.stride
    key = (
        f"{shape[0]}x{height}x{width}x{channels} {kh}x{kw} by {down}x{across} "
        f"{x.element_size()} {out.element_size()} {c.epilogue.activation}"
    )

    def run(config: Mapping[str, int]) -> torch.Tensor:
        result = torch.empty_like(out)
        _launch(x, weight, result, c, config)
        return result

    def others() -> Iterator[Mapping[str, int]]:
        return candidates(*shape)

    return best_config("depthwise_conv2d", key, x.device, _rule(*shape), others, run)


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
