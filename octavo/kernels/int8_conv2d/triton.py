"""Launches the Triton kernel: orders operands, chooses a config, fills arguments in."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton
from torch.nn import functional

from octavo.kernels.common.configs import pieces
from octavo.kernels.common.convolution import Convolution, new_images
from octavo.kernels.common.triton_launch import device_facts, end_arguments, end_constants
from octavo.kernels.depthwise_conv2d.triton import depthwise_conv2d
from octavo.kernels.dispatch.autotune import best_config
from octavo.kernels.int8_conv2d.configs import Facts, candidates, default_config, folds
from octavo.kernels.int8_conv2d.reference import is_pointwise
from octavo.kernels.int8_conv2d.triton_implicit import conv_kernel
from octavo.kernels.int8_gemm import triton as gemm
from octavo.kernels.int8_gemm.configs import bucket

__all__ = ["int8_conv2d"]


def int8_conv2d(
    x: torch.Tensor,
    w: torch.Tensor,
    c: Convolution,
    config: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """See `schema.int8_conv2d`.

    Args:
        x: int8 [B, C, H, W].
        w: int8 [N, C / groups, kh, kw].
        c: window, zero point, and the epilogue, whose residual is [B, H', W', N].
        config: fields of `default_config`, in its place, for tests.

    Returns:
        [B, N, H', W'], channels_last.
    """
    if config is None and is_pointwise(x, w, c):
        y = gemm.int8_gemm(x.permute(0, 2, 3, 1), w.flatten(1), c.epilogue)
        return y.permute(0, 3, 1, 2)
    if config is None and x.shape[1] == len(w) and w.shape[1] == 1:
        return depthwise_conv2d(x, w, c)
    out = new_images(x, len(w), c.window, c.epilogue.out_dtype)
    if out.numel():
        with torch.cuda.device_of(x):
            codes, weights = _channels_last(x, x.shape[1] // w.shape[1]), _channels_last(w, 1)
            config = config or _choose(x, w, weights.shape[-1], out, c)
            _launch(codes, weights, out.permute(0, 2, 3, 1), c, config)
    return out


def _channels_last(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, C, H, W] as [B, H, W, C]; not copied where it lies so.

    Groups of many channels, not a multiple of 16, get zeros behind them, which add nothing to a
    sum: without them a kernel would load every byte apart, for every tap anew.
    """
    last, each = x.permute(0, 2, 3, 1), x.shape[1] // groups
    if folds(each) or not each % 16:
        return last.contiguous()
    parts = functional.pad(last.unflatten(-1, (groups, each)), (0, -each % 16))
    # padding may answer in another memory format where sizes are 1
    return parts.flatten(-2).contiguous()


def _choose(
    x: torch.Tensor, w: torch.Tensor, channels: int, out: torch.Tensor, c: Convolution
) -> Mapping[str, int]:
    """The tuned configuration, or that of the rule, for so many channels a group as are read."""
    window, heavy, groups = c.window, gemm.is_heavy(c.epilogue), x.shape[1] // w.shape[1]
    m, n = bucket(out.numel() // len(w)), len(w) // groups
    facts = Facts(m, n, channels, window.taps, groups, heavy, *device_facts(x.device))
    return best_config(
        "int8_conv2d",
        f"{m}x{n}x{channels} {window.kernel[0]}x{window.kernel[1]} stride {window.stride[0]} "
        f"groups {groups} {_border(c)} {out.element_size()} {'heavy' if heavy else 'light'}",
        x.device,
        default_config(facts),
        functools.partial(candidates, facts),
        functools.partial(int8_conv2d, x, w, c),
    )


def _border(c: Convolution) -> str:
    """How codes beyond an image are made: not at all, as zeros, or as other codes."""
    if not any(c.window.padding):
        return "none"
    return "codes" if c.zero_point else "zeros"


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    c: Convolution,
    config: Mapping[str, int],
) -> None:
    """Fills `out` [B, H', W', N], from `_channels_last` x and w; none is empty."""
    window, e = c.window, c.epilogue
    (_, high, wide, n), channels = out.shape, w.shape[-1]
    groups = x.shape[-1] // channels
    fold, border = folds(channels), _border(c)
    m, each = out.numel() // n, n // groups
    count = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(each, config["BLOCK_N"]) * groups
    codes = x
    if border == "codes" and not fold:
        codes = x.new_full((channels,), c.zero_point)
    conv_kernel[(count,)](
        x, w, codes, out, *end_arguments(e, x),
        c.zero_point, m, each, x.shape[1], x.shape[2], channels, high, wide, groups,
        KERNEL_H=window.kernel[0], KERNEL_W=window.kernel[1],
        STRIDE_H=window.stride[0], STRIDE_W=window.stride[1],
        DILATION_H=window.dilation[0], DILATION_W=window.dilation[1],
        TOP=window.padding[2], LEFT=window.padding[0], BORDER=border,
        FOLD=fold, EVEN_C=channels % config["BLOCK_K"] == 0, PIECES=pieces(config),
        **end_constants(e), **config,
    )  # fmt: skip
