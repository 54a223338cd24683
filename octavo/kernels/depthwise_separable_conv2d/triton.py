"""Launcher of the Triton kernel: memory orders, tile sizes, grid."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
import triton

from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.common.triton_launch import end_arguments, end_constants
from octavo.kernels.depthwise_conv2d.configs import divisor
from octavo.kernels.depthwise_conv2d.triton import by_taps, window_arguments
from octavo.kernels.depthwise_separable_conv2d.configs import candidates, default_config, pieces
from octavo.kernels.depthwise_separable_conv2d.reference import Separable
from octavo.kernels.depthwise_separable_conv2d.triton_separable import separable_kernel
from octavo.kernels.dispatch.autotune import best_config, size_bucket

__all__ = ["depthwise_separable_conv2d"]

_rule = functools.lru_cache(maxsize=4096)(default_config)


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
    size = s.depthwise.window.out_size(x.shape[2], x.shape[3])
    out = torch.empty(
        (x.shape[0], pw_weight.shape[0], *size),
        dtype=s.pointwise.out_dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if out.numel():
        with torch.cuda.device_of(x):
            weights = by_taps(dw_weight), pw_weight.contiguous()
            chosen = _choose(x, weights, out, s) if config is None else config
            _launch(x, weights, out, s, chosen)
    return out


Weights = tuple[torch.Tensor, torch.Tensor]


def _choose(
    x: torch.Tensor, weights: Weights, out: torch.Tensor, s: Separable
) -> Mapping[str, int]:
    """The tuned configuration, or that of the rule."""
    batch, outputs, height, width = out.shape
    shape = (height, width, x.shape[1], outputs, x.element_size())
    window, first, second = s.depthwise.window, s.depthwise.epilogue, s.pointwise
    (kh, kw), (down, across) = window.kernel, window.stride
    key = (
        f"{size_bucket(batch)}x{height}x{width}x{x.shape[1]}x{outputs} "
        f"{kh}x{kw} by {down}x{across} {x.element_size()} {out.element_size()} "
        f"{first.activation} {second.activation} "
        f"{'alone' if second.residual is None else 'residual'}"
    )

    def run(config: Mapping[str, int]) -> torch.Tensor:
        result = torch.empty_like(out)
        _launch(x, weights, result, s, config)
        return result

    def others() -> Iterator[Mapping[str, int]]:
        return candidates(*shape)

    return best_config("depthwise_separable_conv2d", key, x.device, _rule(*shape), others, run)


def _launch(
    x: torch.Tensor, weights: Weights, out: torch.Tensor, s: Separable, config: Mapping[str, int]
) -> None:
    """Fills `out` [B, N, H', W'] from x [B, C, H, W], both channels_last.

    weights: [kh, kw, C] and [N, C], contiguous.
    """
    batch, outputs, height, width = out.shape
    count = triton.cdiv(height, config["BLOCK_H"]) * triton.cdiv(width, config["BLOCK_W"])
    grid = (batch * count * triton.cdiv(outputs, config["BLOCK_N"]),)
    window, first = s.depthwise.window, s.depthwise.epilogue
    separable_kernel[grid](
        x, *weights, out, *_middle_arguments(first, x), s.depthwise.zero_point,
        first.out_zero_point, *end_arguments(s.pointwise, x), batch * height * width, outputs,
        *window_arguments(x, s.depthwise),
        DW_CHANNEL=first.scale_w is not None and first.scale_w.ndim > 0,
        DW_BIAS=first.bias is not None, DW_ACTIVATION=first.activation,
        **end_constants(s.pointwise), KH=window.kernel[0], KW=window.kernel[1],
        PIECES=pieces(config), UNIT=divisor(x.shape[1]), UNIT_N=divisor(outputs), **config,
    )  # fmt: skip


def _middle_arguments(e: Epilogue, absent: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pointers of the depthwise half's epilogue; `absent` for those that are never read."""
    parts = (e.scale_x, e.scale_w, e.bias, e.out_scale)
    return tuple(absent if value is None else value.contiguous() for value in parts)
