"""INT8 convolutions worth measuring: layers of ResNet-50, EfficientNet-Lite0 and MobileNetV2."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.cases import ONE_CODE, ROUNDED_ONCE, SHORT, Call, Case, by_importance, inductor
from octavo.kernels.common.codes import to_int8
from octavo.kernels.common.convolution import make_window
from octavo.kernels.int8_conv2d.configs import Facts, default_config, folds
from octavo.kernels.int8_conv2d.schema import int8_conv2d

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "planned_bytes", "small_shapes"]

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
LEAST_CACHE = 6 << 20
"""Bytes of L2 cache of the smallest card of sm_80 to 120 in a data centre, NVIDIA A10."""
ZERO_POINT = -128
"""Of the activations: what ReLU left."""


def cases(
    shapes: Sequence[tuple[int, ...]] | None = None, dtype: torch.dtype | None = None
) -> list[Case]:
    """Float results with bias and ReLU6, and then codes; shapes in the order of AXES."""
    chosen = shapes or [(batch, *layer) for batch, layer in by_importance(BATCHES, LAYERS)]
    return [
        _case(tuple(shape), dtype or torch.float16, codes)
        for shape in chosen
        for codes in (False, True)
    ]


def small_shapes() -> list[tuple[int, ...]]:
    """One image through a few layers."""
    return [(1, *LAYERS[number]) for number in (0, 2, 3, 4, 8)]


def _case(shape: tuple[int, ...], dtype: torch.dtype, codes: bool) -> Case:
    batch, channels, side, n, kernel, stride, groups = shape
    products = channels // groups * kernel**2

    def make(device: torch.device) -> dict[str, Any]:
        random = torch.Generator(device).manual_seed(sum(shape))
        options: dict[str, Any] = {"generator": random, "device": device}
        integers: dict[str, Any] = {**options, "dtype": torch.int8}
        x = torch.randint(-128, 128, (batch, side, side, channels), **integers)
        w = torch.randint(-128, 128, (n, kernel, kernel, channels // groups), **integers)
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

    pixels = batch * _outputs(shape) ** 2
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


def _outputs(shape: tuple[int, ...]) -> int:
    """The side of the result."""
    _, _, side, _, kernel, stride, _ = shape
    window = make_window((kernel, kernel), (side, side), stride, kernel // 2, 1)
    return window.out_size(side, side)[0]


def planned_bytes(case: Case, config: Mapping[str, int] | None = None) -> int:
    """What the implicit product moves between memory and the chip, in bytes.

    A column of GROUP_M tiles shares its codes in the L2 cache. The lines of an image at which two
    columns meet are read by both; weights too, unless they stay in the cache as well.

    Args:
        case: of `cases`.
        config: fields of `default_config`; those of the rule when not given.
    """
    batch, channels, side, n, kernel, stride, groups = case.shape
    out, each = _outputs(case.shape), channels // groups
    m = batch * out**2
    config = config or default_config(Facts(m, n // groups, each, kernel**2, groups))
    columns = math.ceil(math.ceil(m / config["BLOCK_M"]) / config["GROUP_M"])
    weights = n * each * kernel**2
    again = 0 if weights <= LEAST_CACHE // 2 else weights
    again += max(0, kernel - stride) * side * channels
    # channels that are no multiple of 16 are copied first: written with zeros, and read with them
    wide = groups * 16 * math.ceil(each / 16)
    copied = 0 if folds(each) or not each % 16 else 2 * wide * batch * side**2
    return case.bytes + (columns - 1) * again + copied


def baselines(case: Case, arguments: Mapping[str, Any], compiled: bool) -> list[Call]:
    """Torch's convolution of what the codes stand for, in both memory formats."""
    zero_point = arguments["zero_point"]
    x = (arguments["x_q"].float() - zero_point) * arguments["scale_x"]
    w = arguments["w_q"] * arguments["scale_w"][:, None, None, None]
    # the operator leaves the constant of the zero point to the bias
    constant = zero_point * arguments["scale_x"] * w.sum((1, 2, 3))
    bias = arguments["bias"] + constant
    dtypes = dict.fromkeys((torch.float32, case.dtype))
    if x.is_cuda:
        dtypes |= dict.fromkeys((torch.float16, torch.bfloat16))
    found = []
    for dtype in dtypes:
        exact = dtype == torch.float32
        tolerance = max(case.tolerance, 1e-5 if exact else HALF_PRODUCT)
        for title, layout in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            values, weight = (one.to(dtype).contiguous(memory_format=layout) for one in (x, w))
            run = _convolution(values, weight, bias.to(dtype), arguments)
            moved = (x.numel() + w.numel()) * dtype.itemsize + case.bytes - x.numel() - w.numel()
            name, rate = f"F.conv2d {SHORT[dtype]} {title}", str(dtype).removeprefix("torch.")
            found.append(Call(name, run, tolerance, moved, rate))
            if compiled:
                fused = inductor(run, x.device)
                found.append(Call(f"{name} Inductor", fused, tolerance, moved, rate))
    return found


def _convolution(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, arguments: Mapping[str, Any]
) -> Callable[[], torch.Tensor]:
    """Convolution, bias and ReLU6; then codes, where the operator gives them."""
    out_scale, zero_point = arguments.get("out_scale"), arguments.get("out_zero_point", 0)
    window = (arguments["stride"], arguments["padding"], 1, arguments["groups"])

    def run() -> torch.Tensor:
        y = functional.conv2d(x, w, bias, *window).clamp(0, 6)
        return y if out_scale is None else to_int8(y.float(), out_scale, zero_point)

    return run
