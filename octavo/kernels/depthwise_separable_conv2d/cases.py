"""Depthwise-separable blocks worth measuring: MobileNets, EfficientNets, and a wide kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from octavo.kernels.cases import (
    ONE_CODE,
    ROUNDED_ONCE,
    SHORT,
    Call,
    Case,
    Shapes,
    by_importance,
    dtype_name,
    random_codes,
    seeded,
)
from octavo.kernels.common.convolution import in_kernel_order
from octavo.kernels.depthwise_conv2d.cases import BATCHES, STEP, FloatConvolution, in_torch
from octavo.kernels.depthwise_separable_conv2d.schema import depthwise_separable_conv2d

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

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


def cases(shapes: Shapes | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Floats, and codes to codes, with biases and ReLU6 twice; shapes in the order of AXES."""
    chosen = shapes or by_importance(BATCHES, LAYERS)
    return [_case(tuple(shape), dtype, codes) for shape in chosen for codes in (False, True)]


def small_shapes() -> list[tuple[int, ...]]:
    """Blocks of a small MobileNet."""
    return [(1, 32, 112, 64, 3, 1), (1, 128, 56, 128, 3, 1), (1, 240, 28, 40, 5, 1)]


def _case(shape: tuple[int, ...], dtype: torch.dtype, codes: bool) -> Case:
    batch, channels, side, outputs, kernel, stride = shape
    padding = (kernel - 1) // 2
    pixels = batch * ((side + 2 * padding - kernel) // stride + 1) ** 2

    def make(device: torch.device) -> dict[str, Any]:
        options = seeded(device, channels + side + outputs)

        def values(*sizes: int) -> torch.Tensor:
            return random_codes(*sizes, **options) if codes else torch.randn(sizes, **options)

        dw_bias, pw_bias = (torch.rand(count, **options) * 3 for count in (channels, outputs))
        x, dw_weight = values(batch, channels, side, side), values(channels, 1, kernel, kernel)
        pw_weight = values(outputs, channels)
        arguments: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dw_activation": "relu6",
            "pw_activation": "relu6",
        }
        if codes:
            step = torch.tensor(STEP, device=device)
            arguments["scale_x"] = torch.tensor(0.02, device=device)
            arguments["dw_scale"] = (torch.rand(channels, **options) + 1) * 0.005
            arguments["pw_scale"] = (torch.rand(outputs, **options) + 1) / (100 * channels**0.5)
            arguments |= {"mid_scale": step, "mid_zero_point": -128, "zero_point": 3}
            arguments |= {"out_scale": step, "out_zero_point": -128}
            # what the zero point of the middle adds to the sums, taken off again
            sums = pw_weight.sum(1, dtype=torch.float32)
            pw_bias += 128 * STEP * arguments["pw_scale"] * sums
        else:
            x, dw_weight = x.to(dtype), dw_weight.to(dtype)
            pw_weight = (pw_weight / channels**0.5).to(dtype)
        return {
            "x": x.contiguous(memory_format=torch.channels_last),
            "dw_weight": in_kernel_order(dw_weight, depthwise=True),
            "dw_bias": dw_bias,
            "pw_weight": pw_weight,
            "pw_bias": pw_bias,
            **arguments,
        }

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
        rate="int8" if codes else dtype_name(dtype),
        tolerance=10 * ONE_CODE if codes else 2 * ROUNDED_ONCE[dtype],
        make=make,
        run=depthwise_separable_conv2d,
        by_row=("x",),
    )


def baselines(case: Case, arguments: Mapping[str, Any]) -> list[Call]:
    """Torch's two convolutions in both memory orders, and with BatchNorms that are not folded.

    Of codes: in floats, on what they stand for, and the codes of the result.
    """
    dtype, pw_weight = case.dtype, arguments["pw_weight"][:, :, None, None]
    first = FloatConvolution.of(
        arguments, dtype, case.shape[1], weight="dw_weight", bias="dw_bias", scale_w="dw_scale"
    )
    second = FloatConvolution.of(
        {**arguments, "weight": pw_weight, "stride": 1, "padding": 0},
        dtype,
        1,
        bias="pw_bias",
        scale_x="mid_scale",
        scale_w="pw_scale",
        zero_point="mid_zero_point",
    )
    return in_torch(case, arguments, first, second)
