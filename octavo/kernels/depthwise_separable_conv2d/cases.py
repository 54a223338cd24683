"""Depthwise-separable blocks worth measuring: MobileNets, EfficientNets, and a wide kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.cases import ONE_CODE, ROUNDED_ONCE, SHORT, Call, Case, by_importance
from octavo.kernels.common.convolution import make_window
from octavo.kernels.depthwise_conv2d.cases import (
    BATCHES,
    in_torch,
    in_torch_orders,
    value_size,
)
from octavo.kernels.depthwise_separable_conv2d.configs import default_config, loaded_bytes
from octavo.kernels.depthwise_separable_conv2d.schema import depthwise_separable_conv2d

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "planned_bytes", "small_shapes"]

AXES = "BxCxHxNxKxS"
"""Images, channels, side of an image, output channels, side of the kernel, stride."""
BACKENDS = ("triton", "two-kernel")
LAYERS = (
    (128, 56, 128, 3, 1),
    (512, 14, 512, 3, 1),
    (144, 56, 24, 3, 1),
    (32, 112, 64, 3, 1),
    (672, 14, 112, 5, 1),
    (64, 112, 128, 3, 2),
    (1024, 7, 1024, 3, 1),
    (384, 14, 64, 3, 1),
    (256, 28, 256, 3, 1),
    (128, 56, 256, 3, 2),
    (960, 7, 160, 3, 1),
    (240, 28, 40, 5, 1),
    (256, 28, 512, 3, 2),
    (512, 14, 1024, 3, 2),
    (96, 56, 96, 7, 1),
    (1152, 7, 192, 5, 1),
)
STEP = 6 / 255
"""Scale of values from 0 to 6, whose zero point is -128."""


def cases(
    shapes: Sequence[tuple[int, ...]] | None = None, dtype: torch.dtype | None = None
) -> list[Case]:
    """Floats, and codes to codes, with biases and ReLU6 twice; shapes in the order of AXES."""
    chosen = shapes or [(batch, *layer) for batch, layer in by_importance(BATCHES, LAYERS)]
    kind = dtype or torch.bfloat16
    return [_case(shape, kind, codes) for shape in chosen for codes in (False, True)]


def small_shapes() -> list[tuple[int, ...]]:
    """Blocks of a small MobileNet."""
    return [(1, 32, 112, 64, 3, 1), (1, 128, 56, 128, 3, 1), (1, 240, 28, 40, 5, 1)]


def _case(shape: tuple[int, ...], dtype: torch.dtype, codes: bool) -> Case:
    batch, channels, side, outputs, kernel, stride = shape
    padding = (kernel - 1) // 2
    pixels = batch * ((side + 2 * padding - kernel) // stride + 1) ** 2

    def make(device: torch.device) -> dict[str, Any]:
        random = torch.Generator(device).manual_seed(channels + side + outputs)
        options: dict[str, Any] = {"generator": random, "device": device}
        shapes = {
            "x": (batch, channels, side, side),
            "dw_weight": (channels, 1, kernel, kernel),
            "pw_weight": (outputs, channels),
        }
        arguments: dict[str, Any] = {
            "dw_bias": torch.rand(channels, **options) * 3,
            "pw_bias": torch.rand(outputs, **options) * 3,
            "stride": stride,
            "padding": padding,
            "dw_activation": "relu6",
            "pw_activation": "relu6",
        }
        step = torch.tensor(STEP, device=device)
        for name, shape in shapes.items():
            if codes:
                value = torch.randint(-128, 128, shape, dtype=torch.int8, **options)
            else:
                value = torch.randn(shape, **options)
                value = (value / (channels**0.5 if name == "pw_weight" else 1)).to(dtype)
            arguments[name] = value
        if codes:
            arguments["scale_x"] = torch.tensor(0.02, device=device)
            arguments["dw_scale"] = (torch.rand(channels, **options) + 1) * 0.005
            arguments["pw_scale"] = (torch.rand(outputs, **options) + 1) / (100 * channels**0.5)
            arguments |= {"mid_scale": step, "mid_zero_point": -128, "zero_point": 3}
            arguments |= {"out_scale": step, "out_zero_point": -128}
            # what the zero point of the middle adds to the sums, taken off again
            sums = arguments["pw_weight"].sum(1, dtype=torch.float32)
            arguments["pw_bias"] += 128 * STEP * arguments["pw_scale"] * sums
        arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
        # a channel's neighbour in memory is the next channel, as a layer keeps weights
        by_taps = arguments["dw_weight"].permute(2, 3, 1, 0).contiguous()
        arguments["dw_weight"] = by_taps.permute(3, 2, 0, 1)
        return arguments

    weights = channels * (kernel**2 + outputs)
    values = batch * channels * side**2 + pixels * outputs + weights
    moved = values * (1 if codes else dtype.itemsize) + 4 * (channels + outputs)
    kind = f"i8 of {SHORT[dtype]}" if codes else SHORT[dtype]
    return Case(
        operator="depthwise_separable_conv2d",
        name=f"{batch}x{channels}x{side} to {outputs} k{kernel} s{stride} {kind}",
        shape=shape,
        dtype=dtype,
        bytes=moved + (4 * (channels + outputs) + 12 if codes else 0),
        operations=2 * pixels * weights,
        rate="int8" if codes else str(dtype).removeprefix("torch."),
        tolerance=10 * ONE_CODE if codes else 2 * ROUNDED_ONCE[dtype],
        make=make,
        run=depthwise_separable_conv2d,
        by_row=("x",),
    )


def planned_bytes(case: Case, config: Mapping[str, int] | None = None) -> int:
    """What the kernel's programs read and write, each program each byte once.

    Pixels and pointwise weights that two tiles need are read by both, the second time from the L2
    cache, mostly.

    Args:
        case: of `cases`.
        config: fields of `default_config`; those of the rule when not given.
    """
    batch, channels, side, outputs, kernel, stride = case.shape
    window = make_window((kernel, kernel), (side, side), stride, (kernel - 1) // 2, 1)
    out = window.out_size(side, side)
    size = value_size(case)
    config = config or default_config(*out, channels, outputs, size)
    read = loaded_bytes(window, batch, *out, channels, outputs, size, config)
    once = (batch * side**2 + outputs) * channels * size
    return case.bytes + max(0, read - once)


def baselines(case: Case, arguments: Mapping[str, Any], compiled: bool) -> list[Call]:
    """Torch's two convolutions in both memory orders, and with BatchNorms that are not folded.

    Of codes: in floats, on what they stand for, and the codes of the result.
    """
    first = in_torch(case.dtype, {**arguments, **_half(arguments, "dw")})
    weight, bias = _pointwise(case.dtype, arguments)
    window = {"stride": arguments["stride"], "padding": arguments["padding"]}
    last = first.x.contiguous(memory_format=torch.channels_last)

    def plain(image: torch.Tensor) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            y = functional.conv2d(
                image, first.weight, first.bias, **window, groups=image.shape[1]
            ).clamp_(0, 6)
            return first.end(functional.conv2d(y, weight, bias).clamp_(0, 6))

        return run

    def normalized() -> torch.Tensor:
        y = functional.conv2d(last, first.weight, **window, groups=last.shape[1])
        y = _normalize(y, first.bias).clamp_(0, 6)
        return first.end(_normalize(functional.conv2d(y, weight), bias).clamp_(0, 6))

    return in_torch_orders(last, plain, normalized, compiled)


def _half(arguments: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Weight, bias and scale of a half, under the names of `depthwise_conv2d`."""
    names = {"weight": "weight", "bias": "bias", "scale": "scale_w"}
    return {new: arguments.get(f"{prefix}_{old}") for old, new in names.items()}


def _pointwise(
    dtype: torch.dtype, arguments: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [N, C, 1, 1] and bias [N] of the second half, in floats."""
    weight, bias, scale = arguments["pw_weight"], arguments["pw_bias"], arguments.get("pw_scale")
    if scale is not None:
        weight = weight * scale[:, None]
        bias = bias + arguments["mid_zero_point"] * arguments["mid_scale"] * weight.sum(1)
    return weight.to(dtype)[:, :, None, None], bias.to(dtype)


def _normalize(y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A BatchNorm that adds the bias alone."""
    ones = torch.ones_like(bias)
    return functional.batch_norm(y, torch.zeros_like(bias), ones, ones, bias, eps=0.0)
