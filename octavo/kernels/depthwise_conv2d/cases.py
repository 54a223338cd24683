"""Depthwise convolutions worth measuring: MobileNets, EfficientNets, ConvNeXt, and sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.cases import ONE_CODE, ROUNDED_ONCE, SHORT, Call, Case, by_importance, inductor
from octavo.kernels.common.codes import to_int8
from octavo.kernels.common.convolution import Window, make_window
from octavo.kernels.depthwise_conv2d.configs import default_config, loaded_pixels
from octavo.kernels.depthwise_conv2d.schema import depthwise_conv2d

__all__ = [
    "AXES", "BACKENDS", "BATCHES", "baselines", "cases", "in_torch", "in_torch_orders",
    "kernel_of", "padding_of", "planned_bytes", "small_shapes", "value_size",
]  # fmt: skip

AXES = "BxCxHxWxKxS"
"""Images, channels, height, width, side of the kernel, stride; images of one row are sequences."""
BACKENDS = ("triton", "conv2d")
BATCHES = (32, 1, 128)
LAYERS = (
    (128, 56, 56, 3, 1),
    (512, 14, 14, 3, 1),
    (96, 56, 56, 7, 1),
    (144, 56, 56, 3, 1),
    (672, 14, 14, 5, 1),
    (32, 112, 112, 3, 1),
    (64, 112, 112, 3, 2),
    (384, 14, 14, 7, 1),
    (256, 28, 28, 3, 1),
    (1024, 7, 7, 3, 1),
    (240, 28, 28, 5, 1),
    (960, 7, 7, 3, 1),
    (192, 28, 28, 7, 1),
    (384, 14, 14, 3, 1),
    (768, 7, 7, 7, 1),
    (1152, 7, 7, 5, 1),
    (1024, 1, 2048, 5, 1),
    (4096, 1, 2048, 5, 1),
)
HALF_SUMS = 3e-2
"""Error of sums of rounded values, and of the codes of such sums."""
STEP = 6 / 255
"""Scale of results from 0 to 6, whose zero point is -128."""


def cases(
    shapes: Sequence[tuple[int, ...]] | None = None, dtype: torch.dtype | None = None
) -> list[Case]:
    """Floats, and codes to codes, with bias and ReLU6; shapes in the order of AXES."""
    chosen = shapes or [(batch, *layer) for batch, layer in by_importance(BATCHES, LAYERS)]
    kind = dtype or torch.bfloat16
    return [_case(shape, kind, codes) for shape in chosen for codes in (False, True)]


def small_shapes() -> list[tuple[int, ...]]:
    """Layers of a small MobileNet."""
    return [(1, 32, 112, 112, 3, 1), (1, 128, 56, 56, 3, 1), (1, 240, 28, 28, 5, 1)]


def kernel_of(height: int, kernel: int) -> tuple[int, int]:
    """Taps of a kernel, (vertical, horizontal)."""
    return (1 if height == 1 else kernel), kernel


def padding_of(taps: tuple[int, int]) -> tuple[int, int]:
    """Padding that keeps the size at stride 1, (vertical, horizontal)."""
    return (taps[0] - 1) // 2, (taps[1] - 1) // 2


def _window(height: int, width: int, kernel: int, stride: int) -> Window:
    taps = kernel_of(height, kernel)
    return make_window(taps, (height, width), stride, padding_of(taps), 1)


def _case(shape: tuple[int, ...], dtype: torch.dtype, codes: bool) -> Case:
    batch, channels, height, width, kernel, stride = shape
    window = _window(height, width, kernel, stride)
    taps, size = window.kernel, window.out_size(height, width)

    def make(device: torch.device) -> dict[str, Any]:
        random = torch.Generator(device).manual_seed(channels + height + kernel)
        options: dict[str, Any] = {"generator": random, "device": device}
        shapes = (batch, channels, height, width), (channels, 1, *taps)
        arguments: dict[str, Any] = {
            "bias": torch.rand(channels, **options) * 3,
            "stride": stride,
            "padding": padding_of(taps),
            "activation": "relu6",
        }
        if codes:
            x, weight = (
                torch.randint(-128, 128, shape, dtype=torch.int8, **options) for shape in shapes
            )
            arguments["scale_x"] = torch.tensor(0.02, device=device)
            arguments["scale_w"] = (torch.rand(channels, **options) + 1) * 0.005
            arguments |= {"out_scale": torch.tensor(STEP, device=device), "out_zero_point": -128}
            arguments["zero_point"] = 3
        else:
            x, weight = (torch.randn(shape, **options).to(dtype) for shape in shapes)
        last = {"x": x.contiguous(memory_format=torch.channels_last)}
        # a channel's neighbour in memory is the next channel, as a layer keeps weights
        by_taps = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
        return {**last, "weight": by_taps, **arguments}

    results = batch * channels * size[0] * size[1]
    values = batch * channels * height * width + results + channels * taps[0] * taps[1]
    kind = f"i8 of {SHORT[dtype]}" if codes else SHORT[dtype]
    return Case(
        operator="depthwise_conv2d",
        name=f"{batch}x{channels}x{height}x{width} k{kernel} s{stride} {kind}",
        shape=shape,
        dtype=dtype,
        bytes=(values + 4 * 2 * channels + 8) if codes else values * dtype.itemsize + 4 * channels,
        operations=2 * results * taps[0] * taps[1],
        rate="",  # memory is the limit
        tolerance=ONE_CODE if codes else ROUNDED_ONCE[dtype],
        make=make,
        run=depthwise_conv2d,
        by_row=("x",),
    )


def value_size(case: Case) -> int:
    """Bytes of a value of a case's images: 1 of codes, as its name says."""
    return 1 if " i8 of " in case.name else case.dtype.itemsize


def planned_bytes(case: Case, config: Mapping[str, int] | None = None) -> int:
    """What the kernel's programs read and write, each program each byte once.

    Pixels that two tiles need are read by both, the second time from the L2 cache, mostly.

    Args:
        case: of `cases`.
        config: fields of `default_config`; those of the rule when not given.
    """
    batch, channels, height, width, kernel, stride = case.shape
    window = _window(height, width, kernel, stride)
    high, wide = window.out_size(height, width)
    size = value_size(case)
    config = config or default_config(batch, high, wide, channels, size)
    programs = math.ceil(high / config["BLOCK_H"]) * math.ceil(wide / config["BLOCK_W"])
    read = loaded_pixels(window, high, wide, config) - height * width
    again = batch * read * channels + (batch * programs - 1) * channels * window.taps
    return case.bytes + max(0, again) * size


def baselines(case: Case, arguments: Mapping[str, Any], compiled: bool) -> list[Call]:
    """Torch's convolution in both memory orders, and with a BatchNorm that is not folded.

    Of codes: in floats, on what they stand for, and the codes of the result.
    """
    values = in_torch(case.dtype, arguments)
    x, weight, bias, end = values.x, values.weight, values.bias, values.end
    last = x.contiguous(memory_format=torch.channels_last)
    window = {"stride": arguments["stride"], "padding": arguments["padding"]}
    zeros, ones = torch.zeros_like(bias), torch.ones_like(bias)

    def plain(image: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: end(
            functional.conv2d(image, weight, bias, **window, groups=len(bias)).clamp_(0, 6)
        )

    def normalized() -> torch.Tensor:
        y = functional.conv2d(last, weight, **window, groups=len(bias))
        return end(functional.batch_norm(y, zeros, ones, ones, bias, eps=0.0).clamp_(0, 6))

    return in_torch_orders(last, plain, normalized, compiled)


def in_torch_orders(
    last: torch.Tensor,
    plain: Callable[[torch.Tensor], Callable[[], torch.Tensor]],
    normalized: Callable[[], torch.Tensor],
    compiled: bool,
) -> list[Call]:
    """Calls of torch for images in both memory orders, each also by Inductor where `compiled`.

    Args:
        last: the images, channels_last.
        plain: makes a call from images.
        normalized: the call with BatchNorms that are not folded, on channels_last images.
        compiled: whether Inductor is asked too.
    """
    title = f"torch {SHORT[last.dtype]}"
    calls = {
        f"{title} NHWC": plain(last),
        f"{title} NCHW": plain(last.contiguous()),
        f"{title} NHWC with BN": normalized,
    }
    if compiled:
        calls |= {f"{name} Inductor": inductor(call, last.device) for name, call in calls.items()}
    return [Call(name, call, HALF_SUMS) for name, call in calls.items()]


@dataclass(frozen=True)
class InTorch:
    """Floats that stand for a call.

    Attributes:
        x: images.
        weight: of the depthwise convolution.
        bias: of it.
        end: makes a float result the operator's.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    end: Callable[[torch.Tensor], torch.Tensor]


def in_torch(dtype: torch.dtype, arguments: Mapping[str, Any]) -> InTorch:
    """What a call's arguments stand for."""
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    scale, point = arguments.get("out_scale"), arguments.get("out_zero_point", 0)
    if scale is None:
        return InTorch(x, weight, bias.to(dtype), lambda y: y)
    real = weight * arguments["scale_w"].reshape(-1, 1, 1, 1)
    # the codes' bias holds what the zero point adds to the sums
    constant = arguments["zero_point"] * arguments["scale_x"] * real.sum((1, 2, 3))
    return InTorch(
        ((x.float() - arguments["zero_point"]) * arguments["scale_x"]).to(dtype),
        real.to(dtype),
        (bias + constant).to(dtype),
        lambda y: to_int8(y.float(), scale, point),
    )
