"""INT8 convolutions worth measuring: layers of ResNet-50, EfficientNet-Lite0 and MobileNetV2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
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
from octavo.kernels.common.convolution import make_window
from octavo.kernels.depthwise_conv2d.cases import FloatConvolution, float_images, result_of
from octavo.kernels.int8_conv2d.schema import int8_conv2d

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

AXES = "BxCxHxNxKxSxG"
"""Images, channels, side of an image, output channels, side of the kernel, stride, groups."""
BACKENDS = ("triton", "onednn", "int_mm")
BATCHES = (32, 1, 128)
LAYERS = (
    (64, 56, 64, 3, 1, 1),  # ResNet-50
    (256, 14, 256, 3, 1, 1),
    (512, 7, 512, 3, 1, 1),
    (16, 112, 96, 1, 1, 1),  # EfficientNet-Lite0 and MobileNetV2
    (3, 224, 32, 3, 2, 1),
    (256, 56, 64, 1, 1, 1),
    (128, 28, 128, 3, 1, 1),
    (1024, 14, 256, 1, 1, 1),
    (144, 28, 40, 1, 1, 1),
    (128, 56, 128, 3, 2, 1),
    (96, 56, 24, 1, 1, 1),
    (80, 14, 480, 1, 1, 1),
    (1152, 7, 192, 1, 1, 1),
    (320, 7, 1280, 1, 1, 1),
    (3, 224, 64, 7, 2, 1),
    (256, 56, 512, 1, 2, 1),
    (128, 28, 128, 3, 1, 32),  # ResNeXt
)
HALF_PRODUCT = 3e-2
"""Error of sums of rounded values, and of the codes of such sums."""
ZERO_POINT = -128
"""Of the activations: what ReLU left."""


def cases(shapes: Shapes | None = None, dtype: torch.dtype = torch.float16) -> list[Case]:
    """Float results with bias and ReLU6, and then codes; shapes in the order of AXES."""
    chosen = shapes or by_importance(BATCHES, LAYERS)
    return [_case(tuple(shape), dtype, codes) for shape in chosen for codes in (False, True)]


def small_shapes() -> list[tuple[int, ...]]:
    """One image through a few layers."""
    return [(1, *LAYERS[number]) for number in (0, 2, 3, 4, 8)]


def _case(shape: tuple[int, ...], dtype: torch.dtype, codes: bool) -> Case:
    batch, channels, side, n, kernel, stride, groups = shape
    products = channels // groups * kernel**2

    window = make_window((kernel, kernel), (side, side), stride, kernel // 2, 1)
    pixels = batch * window.out_size(side, side)[0] ** 2

    def make(device: torch.device) -> dict[str, Any]:
        options = seeded(device, sum(shape))
        x = random_codes(batch, side, side, channels, **options)
        w = random_codes(n, kernel, kernel, channels // groups, **options)
        arguments = {
            "x_q": x.permute(0, 3, 1, 2),
            "w_q": w.permute(0, 3, 1, 2),
            "scale_x": torch.tensor(0.02, device=device),
            "scale_w": (torch.rand(n, **options) + 1) / (100 * products**0.5),
            "bias": torch.randn(n, **options),
            "stride": stride,
            "padding": kernel // 2,
            "groups": groups,
            "zero_point": ZERO_POINT,
            "activation": "relu6",
            "out_dtype": dtype,
        }
        if codes:
            out_scale = torch.tensor(6 / 255, device=device)
            codes_out = {"out_dtype": torch.int8, "out_scale": out_scale}
            arguments |= {**codes_out, "out_zero_point": ZERO_POINT}
        return arguments

    moved = batch * side**2 * channels + n * products
    moved += pixels * n * (1 if codes else dtype.itemsize)
    return Case(
        operator="int8_conv2d",
        name="x".join(map(str, shape)) + f" {SHORT[dtype]}" + (" to codes" if codes else ""),
        shape=shape,
        dtype=dtype,
        bytes=moved + 4 * (2 * n + 1 + codes),
        operations=2 * pixels * n * products,
        rate="int8",
        tolerance=ONE_CODE if codes else ROUNDED_ONCE[dtype],
        make=make,
        run=int8_conv2d,
        by_row=("x_q", "residual"),
    )


def baselines(case: Case, arguments: Mapping[str, Any]) -> list[Call]:
    """Torch's convolution of what the codes stand for, in both memory formats."""
    codes = arguments["x_q"], arguments["w_q"]
    x, count = float_images(codes[0], arguments), sum(one.numel() for one in codes)
    dtypes = dict.fromkeys((torch.float32, case.dtype))
    if x.is_cuda:
        dtypes |= dict.fromkeys((torch.float16, torch.bfloat16))
    found = []
    for dtype in dtypes:
        tolerance = max(case.tolerance, 1e-5 if dtype == torch.float32 else HALF_PRODUCT)
        moved = count * dtype.itemsize + case.bytes - count
        layer = FloatConvolution.of(arguments, dtype, arguments["groups"], weight="w_q")
        for title, layout in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            run = _convolution(layer, x.to(dtype), layout, arguments)
            name = f"F.conv2d {SHORT[dtype]} {title}"
            found.append(Call(name, run, tolerance, moved, dtype_name(dtype)))
    return found


def _convolution(
    layer: FloatConvolution,
    x: torch.Tensor,
    layout: torch.memory_format,
    arguments: Mapping[str, Any],
) -> Callable[[], torch.Tensor]:
    """Convolution, bias and ReLU6; then codes, where the operator gives them."""
    x, weight = (one.contiguous(memory_format=layout) for one in (x, layer.weight))
    layer = replace(layer, weight=weight)
    return lambda: result_of(layer(x), arguments)
