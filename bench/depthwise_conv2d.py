"""Depthwise convolution: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.aot import UNLIKE, Variant, epilogue_types

FOLDER = "octavo.kernels.depthwise_conv2d"
SIZES = ("H", "W", "C", "OUT_H", "OUT_W", "TOP", "LEFT")
STEPS = ("STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W")
FREE = ("residual_zero_point", "out_zero_point", "zero_point")
BYTES = {"fp16": 2, "fp32": 4, "i8": 1}


def static_variants() -> Iterator[Variant]:
    """The rule's tiles for each dtype and kernel size, and some candidates."""
    from octavo.kernels.depthwise_conv2d.configs import candidates, default_config

    for kernel in (3, 5, 7):
        yield _variant("56x56x128", kernel, default_config(32, 56, 56, 128, 2))
        yield _variant("56x56x128", kernel, default_config(32, 56, 56, 128, 1), x="i8", out="i8")
    yield _variant("7x7x1024", 3, default_config(32, 7, 7, 1024, 2), stride=2)
    yield _variant("14x14x512", 3, default_config(32, 14, 14, 512, 1), stride=2, x="i8", out="i8")
    yield _variant("56x56x128", 3, default_config(32, 56, 56, 128, 4), x="fp32", out="fp32")
    for x in ("fp16", "i8"):  # of MobileNetV3, of another multiple than 16; and of none
        for channels in (120, 33):
            uneven = default_config(32, 28, 28, channels, BYTES[x])
            shape = f"28x28x{channels}"
            yield _variant(shape, 5, uneven, x=x, out=x, channels=channels, architectures=UNLIKE)
    yield _variant("1x1x1", 1, default_config(1, 1, 1, 1, 2), least=True, architectures=UNLIKE)
    for x in ("fp16", "i8"):
        sizes = (32, 56, 56, 128, BYTES[x])
        offered = [one for one in candidates(*sizes) if one != default_config(*sizes)]
        for config in offered[:: max(1, len(offered) // 4)]:
            yield _variant("candidate", 7, config, x=x, out=x, architectures=UNLIKE)


def window_numbers(stride: int, least: bool) -> tuple[dict[str, str], dict[str, int]]:
    """Types of the sizes and steps of a window, and those that are 1, which are constants.

    least: all sizes are 1.
    """
    ones = {name: 1 for name in STEPS if stride == 1 or "STRIDE" not in name}
    ones |= dict.fromkeys(SIZES if least else ("TOP", "LEFT"), 1)
    names = [name for name in (*SIZES, *STEPS) if name not in ones]
    return dict.fromkeys(names, "i32"), ones


def title_words(
    kernel: int, x: str, shape: str, config: Mapping[str, int], stride: int
) -> list[str]:
    """What tells a variant of a depthwise kernel from others."""
    blocks = "x".join(str(size) for name, size in config.items() if name.startswith("BLOCK"))
    words = [f"{kernel}x{kernel}", x, f"{shape} by {blocks}", f"{config['num_warps']} warps"]
    return words + ["a row of taps at once"] * config["ROW"] + ["stride 2"] * (stride == 2)


def _variant(
    shape: str,
    kernel: int,
    config: Mapping[str, int],
    *,
    stride: int = 1,
    least: bool = False,
    channels: int = 128,
    x: str = "fp16",
    out: str = "fp16",
    architectures: tuple[int, ...] = (),
) -> Variant:
    from octavo.kernels.depthwise_conv2d.configs import divisor

    pointers = {"x_ptr": f"*{x}", "w_ptr": f"*{x}", "out_ptr": f"*{out}", **epilogue_types(out)}
    pointers["residual_ptr"] = f"*{x}"
    numbers, steps = window_numbers(stride, least)
    constants: dict[str, Any] = {
        **steps,
        "KH": kernel,
        "KW": kernel,
        "TOKEN": False,
        "CHANNEL": True,
        "BIAS": True,
        "RESIDUAL": False,
        "REQUANTIZE": out == "i8",
        "RAW": False,
        "ACTIVATION": "hardswish",
        "UNIT": divisor(channels),
    }
    numbers |= dict.fromkeys(("M", *FREE), "i32")
    words = title_words(kernel, x, shape, config, stride)
    options: dict[str, Any] = {"architectures": architectures} if architectures else {}
    return Variant(
        f"depthwise_conv2d: {', '.join(words)}",
        f"{FOLDER}.triton_depthwise",
        "depthwise_kernel",
        {**pointers, **numbers},
        constants,
        (*pointers, *(["C"] * (channels % 16 == 0 and not least))),
        dict(config),
        **options,
    )
