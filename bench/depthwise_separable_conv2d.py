"""Depthwise-separable convolution: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.aot import UNLIKE, Variant, epilogue_types
from bench.depthwise_conv2d import BYTES, title_words, window_numbers

FOLDER = "octavo.kernels.depthwise_separable_conv2d"
SCALES = ("dw_scale_x_ptr", "dw_scale_ptr", "mid_scale_ptr")
ZERO_POINTS = ("zero_point", "mid_zero_point", "residual_zero_point", "out_zero_point")


def static_variants() -> Iterator[Variant]:
    """The rule's tiles for each dtype and kernel size, and other candidates where they differ."""
    from octavo.kernels.depthwise_separable_conv2d.configs import candidates, default_config

    for kernel in (3, 5, 7):
        for x in ("fp16", "i8"):
            yield _variant(
                "56x56x128 to 128", kernel, default_config(56, 56, 128, 128, BYTES[x]), x
            )
    for x in ("fp16", "i8"):
        wide = default_config(14, 14, 512, 512, BYTES[x])
        yield _variant("14x14x512 to 512", 3, wide, x, residual=True)
        yield _variant("7x7x960 to 160", 3, default_config(7, 7, 960, 160, BYTES[x]), x, stride=2)
    for x in ("fp16", "i8"):  # of MobileNetV3, of another multiple than 16; and of none
        for sizes in ((120, 40), (33, 33)):
            uneven, shape = (
                default_config(28, 28, *sizes, BYTES[x]),
                f"28x28x{sizes[0]} to {sizes[1]}",
            )
            yield _variant(shape, 5, uneven, x, sizes=sizes, architectures=UNLIKE)
    yield _variant(
        "1x1x1 to 1", 1, default_config(1, 1, 1, 1, 1), "i8", least=True, architectures=UNLIKE
    )
    for x in ("fp16", "i8"):
        offered = list(candidates(56, 56, 128, 256, BYTES[x]))
        for config in offered[:: max(1, len(offered) // 4)]:
            yield _variant("candidate", 3, config, x, architectures=UNLIKE)


def _variant(
    shape: str,
    kernel: int,
    config: Mapping[str, int],
    x: str,
    *,
    stride: int = 1,
    least: bool = False,
    sizes: tuple[int, int] = (128, 128),
    residual: bool = False,
    architectures: tuple[int, ...] = (),
) -> Variant:
    from octavo.kernels.common.configs import pieces
    from octavo.kernels.depthwise_conv2d.configs import divisor

    aligned = [name for name, size in zip("CN", sizes, strict=True) if size % 16 == 0 and not least]
    pointers = dict.fromkeys(("x_ptr", "dw_ptr", "pw_ptr", "out_ptr", "residual_ptr"), f"*{x}")
    pointers |= {**dict.fromkeys(SCALES, "*fp32"), **epilogue_types(x)}
    pointers["dw_bias_ptr"] = pointers["bias_ptr"]
    numbers, steps = window_numbers(stride, least)
    constants: dict[str, Any] = {
        **steps,
        "KH": kernel,
        "KW": kernel,
        "DW_CHANNEL": True,
        "DW_BIAS": True,
        "DW_ACTIVATION": "relu6",
        "TOKEN": False,
        "CHANNEL": True,
        "BIAS": True,
        "RESIDUAL": residual,
        "REQUANTIZE": x == "i8",
        "RAW": False,
        "ACTIVATION": "hardswish",
        "PIECES": pieces(config),
        "UNIT": divisor(sizes[0]),
        "UNIT_N": divisor(sizes[1]),
    }
    numbers |= dict.fromkeys(("M", *ZERO_POINTS), "i32")
    if least:
        constants["N"] = 1
    else:
        numbers["N"] = "i32"
    words = title_words(kernel, x, shape, config, stride) + ["residual"] * residual
    options: dict[str, Any] = {"architectures": architectures} if architectures else {}
    return Variant(
        f"depthwise_separable_conv2d: {', '.join(words)}",
        f"{FOLDER}.triton_separable",
        "separable_kernel",
        {**pointers, **numbers},
        constants,
        (*pointers, *aligned),
        dict(config),
        **options,
    )
