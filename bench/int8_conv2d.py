"""INT8 convolution: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bench.aot import ARCHITECTURES, UNLIKE, Variant, epilogue_types
from octavo.kernels.common.configs import pieces
from octavo.kernels.int8_conv2d.configs import Facts, candidates, default_config, folds

SIZES = ("H", "W", "OUT_H", "OUT_W", "M", "residual_zero_point", "out_zero_point", "zero_point")
HOPPER, SMALL = (9, 0), (8, 6)
LARGE_MEMORY = (80, 90, 100)
"""Architectures with room for three stages of the largest tile, which the rule gives them."""


def static_variants() -> Iterator[Variant]:
    """The rule's forms for layers of ResNet-50 and of mobile networks, and the candidates."""
    middle = Facts(m=32 * 28 * 28, n=128, channels=128, taps=9, capability=HOPPER)
    few = replace(middle, m=64, n=512, channels=512)
    for facts, chosen in (
        (middle, LARGE_MEMORY),
        (replace(middle, capability=SMALL), (86, 89, 120)),
    ):
        yield _variant("128@28", facts, default_config(facts), architectures=chosen)
        long = replace(facts, heavy=True)
        yield _variant("128@28", long, default_config(long), border="zeros", architectures=chosen)
        pointwise = replace(facts, n=512, channels=256, taps=1)
        yield _variant(
            "256@56", pointwise, default_config(pointwise), border="none", architectures=chosen
        )
    yield _variant("512@7", few, default_config(few))
    stem = Facts(m=32 * 112 * 112, n=32, channels=3, taps=9)
    yield _variant("3@224", stem, default_config(stem))
    wide = replace(stem, n=64, taps=49, heavy=True)
    yield _variant("3@224", wide, default_config(wide), border="zeros", out="fp16")
    grouped = Facts(m=32 * 56 * 56, n=4, channels=4, taps=9, groups=32)
    yield _variant("4 x 32@56", grouped, default_config(grouped))
    grey = Facts(m=32 * 28 * 28, n=6, channels=1, taps=25)
    yield _variant("1@28", grey, default_config(grey))
    uneven = Facts(m=32 * 28 * 28, n=40, channels=144, taps=9)
    yield _variant("144@28", uneven, default_config(uneven))
    deepest: dict[tuple[int, ...], Mapping[str, int]] = {}
    for config in candidates(middle):
        shape = (config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"])
        if config["num_stages"] <= 3 and shape not in deepest:
            deepest[shape] = config
    for config in deepest.values():
        yield _variant("candidate", middle, config, architectures=LARGE_MEMORY)
    for config in candidates(stem):
        yield _variant("candidate of a stem", stem, config, architectures=UNLIKE)


def _variant(
    shape: str,
    facts: Facts,
    config: Mapping[str, int],
    *,
    border: str = "codes",
    out: str = "i8",
    architectures: tuple[int, ...] = ARCHITECTURES,
) -> Variant:
    pointers = {f"{name}_ptr": "*i8" for name in ("x", "w", "border", "residual")}
    pointers |= {"out_ptr": f"*{out}", **epilogue_types(out)}
    side = {1: 1, 9: 3, 25: 5, 49: 7}[facts.taps]
    constants: dict[str, Any] = {
        "KERNEL_H": side,
        "KERNEL_W": side,
        "STRIDE_H": 2,
        "STRIDE_W": 2,
        "DILATION_H": 1,
        "DILATION_W": 1,
        "TOP": side // 2,
        "LEFT": side // 2,
        "BORDER": border,
        "TOKEN": False,
        "CHANNEL": True,
        "BIAS": True,
        "RESIDUAL": facts.heavy,
        "REQUANTIZE": out == "i8",
        "RAW": False,
        "ACTIVATION": "hardswish" if facts.heavy else "relu6",
        "FOLD": folds(facts.channels),
        "EVEN_C": facts.channels % config["BLOCK_K"] == 0,
        "PIECES": pieces(config),
    }
    numbers = dict.fromkeys(("N", "C", "GROUPS", *SIZES), "i32")
    aligned = [name for name, value in (("N", facts.n), ("C", facts.channels)) if value % 16 == 0]
    for name, value in (("GROUPS", facts.groups), ("C", facts.channels)):
        if value == 1:  # which the compiler makes a constant
            del numbers[name]
            constants[name] = 1
    block = "x".join(str(config[f"BLOCK_{axis}"]) for axis in "MNK")
    words = [
        f"{side}x{side}",
        f"{shape} to {facts.n * facts.groups} by {block}",
        f"{config['num_stages']} stages",
        {"codes": "padded with codes", "zeros": "padded with zeros", "none": ""}[border],
        "residual, hardswish" if facts.heavy else "",
        "" if out == "i8" else out,
    ]
    return Variant(
        f"int8_conv2d: {', '.join(filter(None, words))}",
        "octavo.kernels.int8_conv2d.triton_implicit",
        "conv_kernel",
        {**pointers, **numbers},
        constants,
        (*pointers, *aligned),
        dict(config),
        architectures=architectures,
    )
