"""INT8 matrix product: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.aot import ARCHITECTURES, Variant, epilogue_types

FOLDER = "octavo.kernels.int8_gemm"
EPILOGUE = {"TOKEN": True, "CHANNEL": True, "RAW": False, "REQUANTIZE": False}
SIZES = {"N": "i32", "K": "i32"}
UNSPECIALIZED = {"M": "i32", "residual_zero_point": "i32", "out_zero_point": "i32"}
HOPPER = (9, 0)


def static_variants() -> Iterator[Variant]:
    """The rule's forms with the longest epilogue, and every tile that is measured for M >= 64.

    Where the rule asks for the architecture, each form is compiled for those that get it.
    """
    from octavo.kernels.int8_gemm.configs import default_config

    swapped = default_config(1, 4096, 4096, capability=HOPPER)
    yield _config("1x4096x4096", swapped, few=True, architectures=(90,))
    others = tuple(one for one in ARCHITECTURES if one != 90)
    yield _config("1x4096x4096", default_config(1, 4096, 4096), few=True, architectures=others)
    deep = default_config(64, 4096, 4096, capability=HOPPER)
    yield _config("64x4096x4096", deep, architectures=(90, 100))
    yield _config("4096x4096x4096", default_config(4096, 4096, 4096, heavy=True))
    yield _config("64x4096x4000", default_config(64, 4096, 4000), even=False)
    yield _config("4096x4096x4096", default_config(4096, 4096, 4096), out="fp32", fused=False)
    yield _config("4096x4096x4096", default_config(4096, 4096, 4096, heavy=True), out="i8")
    for config in _shapes(persistent=0):
        one = {**config, "SPLIT_K": 1}
        yield _config("M >= 64", one, fused=False, architectures=(80, 90, 100))
    for config in _shapes(persistent=1):
        yield _persistent("M >= 64", config, fused=False)
    yield _persistent(
        "4096x4096x4096", default_config(4096, 4096, 4096, heavy=True, capability=HOPPER)
    )


def _shapes(persistent: int) -> list[Mapping[str, int]]:
    """One of the candidates for M >= 64 for each shape of a tile, that with the most stages."""
    from octavo.kernels.int8_gemm.configs import candidates

    found: dict[tuple[int, int], Mapping[str, int]] = {}
    for m in (64, 128, 4096):
        for config in candidates(m, 4096, 4096, capability=HOPPER):
            shape = (config["BLOCK_M"], config["BLOCK_N"])
            deeper = shape not in found or config["num_stages"] > found[shape]["num_stages"]
            fits = persistent or config["num_stages"] * sum(shape) * config["BLOCK_K"] <= 3 << 15
            if config["PERSISTENT"] == persistent and fits and deeper:
                found[shape] = config
    return list(found.values())


def _end(config: Mapping[str, int], fused: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants of the epilogue, and the fields of the tiles that kernels take."""
    from octavo.kernels.common.configs import pieces

    constants = {
        **EPILOGUE,
        "BIAS": fused,
        "RESIDUAL": fused,
        "ACTIVATION": "gelu" if fused else "none",
        "PIECES": pieces(config),
    }
    return constants, {
        name: config[name] for name in config if name not in ("PERSISTENT", "FLATTEN")
    }


def _ends(out: str) -> dict[str, str]:
    """Types of the epilogue's pointers: a residual of codes where the result is codes."""
    residual = "*i8" if out == "i8" else "*bf16"
    return {**epilogue_types(out, floats="bf16"), "residual_ptr": residual}


def _title(shape: str, config: Mapping[str, int], *words: str) -> str:
    block = "x".join(str(config[f"BLOCK_{axis}"]) for axis in "MNK")
    return ", ".join([f"int8_gemm: {shape} by {block}", *filter(None, words)])


def _config(
    shape: str,
    config: Mapping[str, int],
    *,
    few: bool = False,
    even: bool = True,
    out: str = "bf16",
    fused: bool = True,
    architectures: tuple[int, ...] = ARCHITECTURES,
) -> Variant:
    constants, chosen = _end(config, fused)
    types = {"x_ptr": "*i8", "w_ptr": "*i8", "out_ptr": f"*{out}", **_ends(out), **SIZES}
    types |= {"partial_ptr": "*i32", "arrived_ptr": "*i32"}
    types |= {"stride_xm": "i64", "stride_wn": "i64"}
    if out == "i8":
        constants["REQUANTIZE"] = True
    words = (
        "swapped" if config["SWAP"] else "",
        "split K" if config["SPLIT_K"] > 1 else "",
        "bias, gelu, residual" if fused else "",
        "" if even else "K with a remainder",
        "" if out == "bf16" else out,
    )
    return Variant(
        _title(shape, config, *words),
        f"{FOLDER}.triton_tiles",
        "tiles_kernel",
        {**types, **UNSPECIALIZED},
        {**constants, "EVEN_K": even, "FEW": few},
        tuple(types),
        chosen,
        architectures=architectures,
    )


def _persistent(shape: str, config: Mapping[str, int], *, fused: bool = True) -> Variant:
    constants, chosen = _end(config, fused)
    chosen = {name: value for name, value in chosen.items() if name not in ("SPLIT_K", "SWAP")}
    types = {"out_ptr": "*bf16", **_ends("bf16"), **SIZES}
    boxes = {
        f"{name}_desc": f"tensordesc<i8[{config[block]}, {config['BLOCK_K']}]>"
        for name, block in (("x", "BLOCK_M"), ("w", "BLOCK_N"))
    }
    words = (
        "persistent",
        "flat" if config["FLATTEN"] else "",
        "bias, gelu, residual" if fused else "",
    )
    return Variant(
        _title(shape, config, *words),
        f"{FOLDER}.triton_persistent",
        "persistent_kernel",
        {**boxes, **types, **UNSPECIALIZED},
        {**constants, "FLATTEN": bool(config["FLATTEN"])},
        tuple(types),
        chosen,
        architectures=(90, 100),  # TMA; on consumer cards of sm_120 the rule takes the other kernel
    )
