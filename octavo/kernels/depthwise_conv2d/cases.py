"""Depthwise convolutions worth measuring: MobileNets, EfficientNets, ConvNeXt, and sequences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.cases import (
    ONE_CODE,
    ROUNDED_ONCE,
    SHORT,
    Call,
    Case,
    Shapes,
    by_importance,
    random_codes,
    seeded,
)
from octavo.kernels.common.codes import to_int8
from octavo.kernels.common.convolution import in_kernel_order, make_window
from octavo.kernels.depthwise_conv2d.schema import depthwise_conv2d

__all__ = [
    "AXES", "BACKENDS", "BATCHES", "FloatConvolution", "baselines", "cases",
    "float_images", "in_torch", "result_of", "small_shapes",
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


def cases(shapes: Shapes | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Floats, and codes to codes, with bias and ReLU6; shapes in the order of AXES."""
    chosen = shapes or by_importance(BATCHES, LAYERS)
    return [_case(tuple(shape), dtype, codes) for shape in chosen for codes in (False, True)]


def small_shapes() -> list[tuple[int, ...]]:
    """Layers of a small MobileNet."""
    return [(1, 32, 112, 112, 3, 1), (1, 128, 56, 56, 3, 1), (1, 240, 28, 28, 5, 1)]


def _case(shape: tuple[int, ...], dtype: torch.dtype, codes: bool) -> Case:
    batch, channels, height, width, kernel, stride = shape
    taps = (1 if height == 1 else kernel), kernel
    padding = (taps[0] - 1) // 2, (taps[1] - 1) // 2
    size = make_window(taps, (height, width), stride, padding, 1).out_size(height, width)

    def make(device: torch.device) -> dict[str, Any]:
        options = seeded(device, channels + height + kernel)
        bias = torch.rand(channels, **options) * 3
        x, weight = (
            random_codes(*sizes, **options) if codes else torch.randn(sizes, **options).to(dtype)
            for sizes in ((batch, channels, height, width), (channels, 1, *taps))
        )
        arguments = {
            "x": x.contiguous(memory_format=torch.channels_last),
            "weight": in_kernel_order(weight, depthwise=True),
            "bias": bias,
            "stride": stride,
            "padding": padding,
            "activation": "relu6",
        }
        if codes:
            arguments["scale_x"] = torch.tensor(0.02, device=device)
            arguments["scale_w"] = (torch.rand(channels, **options) + 1) * 0.005
            arguments |= {"out_scale": torch.tensor(STEP, device=device), "out_zero_point": -128}
            arguments["zero_point"] = 3
        return arguments

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


def baselines(case: Case, arguments: Mapping[str, Any]) -> list[Call]:
    """Torch's convolution in both memory orders, and with a BatchNorm that is not folded.

    Of codes: in floats, on what they stand for, and the codes of the result.
    """
    return in_torch(case, arguments, FloatConvolution.of(arguments, case.dtype, case.shape[1]))


@dataclass(frozen=True)
class FloatConvolution:
    """A convolution of floats, with ReLU6 behind it.

    Attributes:
        weight: [N, C / groups, kh, kw].
        bias: [N].
        window: stride, padding and groups as torch takes them.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    window: Mapping[str, Any]

    @classmethod
    def of(
        cls, arguments: Mapping[str, Any], dtype: torch.dtype, groups: int, **names: str
    ) -> FloatConvolution:
        """What a call's arguments stand for.

        Args:
            arguments: of the call.
            dtype: of the floats.
            groups: of the convolution.
            **names: weight, bias, and of codes scale_x, scale_w and zero_point -> arguments that
                are called otherwise.
        """
        roles = ("weight", "bias", "scale_x", "scale_w", "zero_point")
        found: list[Any] = [arguments.get(names.get(role, role)) for role in roles]
        weight, bias, scale_x, scale_w, zero_point = found
        if scale_w is not None:
            weight = weight * scale_w.reshape(-1, 1, 1, 1)
            # the codes' bias holds what the zero point adds to the sums
            bias = bias + zero_point * scale_x * weight.sum((1, 2, 3))
        window = {"stride": arguments["stride"], "padding": arguments["padding"], "groups": groups}
        return cls(weight.to(dtype), bias.to(dtype), window)

    def __call__(self, x: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """The result for images; with `normalize` it is a BatchNorm that adds the bias."""
        if not normalize:
            return functional.conv2d(x, self.weight, self.bias, **self.window).clamp_(0, 6)
        y = functional.conv2d(x, self.weight, **self.window)
        zeros, ones = torch.zeros_like(self.bias), torch.ones_like(self.bias)
        return functional.batch_norm(y, zeros, ones, ones, self.bias, eps=0.0).clamp_(0, 6)


def in_torch(case: Case, arguments: Mapping[str, Any], *layers: FloatConvolution) -> list[Call]:
    """Torch's calls for images in both memory orders, and with BatchNorms that are not folded."""
    last = float_images(arguments["x"], arguments).to(case.dtype)

    def call(x: torch.Tensor, normalize: bool = False) -> Callable[[], torch.Tensor]:
        return lambda: result_of(
            functools.reduce(lambda y, layer: layer(y, normalize), layers, x), arguments
        )

    calls = {"NHWC": call(last), "NCHW": call(last.contiguous()), "NHWC with BN": call(last, True)}
    return [
        Call(f"torch {SHORT[case.dtype]} {order}", run, HALF_SUMS) for order, run in calls.items()
    ]


def float_images(x: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """The images that a call's codes stand for; floats as they are."""
    scale = arguments.get("scale_x")
    return x if scale is None else (x.float() - arguments["zero_point"]) * scale


def result_of(y: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """A float result as a call gives it: in codes, where it has a scale for them."""
    scale = arguments.get("out_scale")
    return y if scale is None else to_int8(y.float(), scale, arguments["out_zero_point"])
