"""Weight-only product: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.aot import ARCHITECTURES, UNLIKE, Variant

FOLDER = "octavo.kernels.weight_only_gemm"
END = {"bias_ptr": "*bf16", "residual_ptr": "*bf16"}
SCALES = {"scale_ptr": "*fp32", "zero_ptr": "*u8", "GROUPS": "i32"}
STRIDES = {"stride_xm": "i64", "stride_wn": "i64"}
WIDE = {"fp16": "*i32", "bf16": "*i32", "fp32": "*i64"}


def static_variants() -> Iterator[Variant]:
    """The forms that the launcher uses."""
    for bits, group in ((8, 0), (4, 32)):
        yield _gemv((1, 4096, 4096), bits, group, "bf16")
    yield _gemv((1, 4096, 4096), 4, 128, "fp16", asymmetric=True, fused=True)
    yield _gemv((1, 768, 14336), 8, 0, "fp16")
    yield _gemm((16, 28672, 4096), 8, 0, "bf16")
    yield _gemm((16, 28672, 4096), 4, 32, "bf16")
    yield _gemm((64, 28672, 4096), 4, 128, "bf16")
    yield _gemm((16, 4096, 4096), 4, 128, "fp16")
    yield _gemm((64, 28672, 4096), 4, 64, "fp16", asymmetric=True, fused=True)
    yield _gemm((4096, 28672, 4096), 8, 0, "fp16", fused=True)
    yield _gemm((4096, 28672, 4096), 4, 128, "bf16", asymmetric=True, fused=True)
    yield _gemm((64, 28672, 4096), 4, 128, "fp32")
    yield _gemm((16, 28672, 4096), 3, 128, "bf16", fast=False)
    yield _gather()
    for config in _shapes():
        yield _gemm((config["BLOCK_M"], 28672, 4096), 4, 128, "bf16", config=config)


def _shapes() -> list[dict[str, int]]:
    """One of the candidates for M >= 64 for each shape of a tile."""
    from octavo.kernels.weight_only_gemm.configs import candidates

    found: dict[tuple[int, ...], dict[str, int]] = {}
    for m in (64, 4096):
        for config in candidates(m, 28672, 4096, bits=4, group_size=128):
            shape = tuple(config[f"BLOCK_{axis}"] for axis in "MNK")
            if config["SPLIT_K"] == 1 and shape[0] >= 64:
                found.setdefault(shape, config)
    return list(found.values())


def _title(
    shape: tuple[int, int, int], bits: int, group: int, kind: str, options: dict[str, bool]
) -> str:
    said = [kind, f"{bits} bits"] + ([f"groups of {group}"] if group else [])
    said += [name for name, value in options.items() if value]
    return f"weight_only_gemm: {'x'.join(map(str, shape))}, {', '.join(said)}"


def _epilogue(group: int, asymmetric: bool, fused: bool) -> dict[str, Any]:
    return {
        "GROUP": group,
        "ASYMMETRIC": asymmetric,
        "BIAS": fused,
        "RESIDUAL": fused,
        "ACTIVATION": "gelu" if fused else "none",
    }


def _gemv(
    shape: tuple[int, int, int],
    bits: int,
    group: int,
    kind: str,
    asymmetric: bool = False,
    fused: bool = False,
) -> Variant:
    from octavo.kernels.weight_only_gemm.configs import default_config

    chosen = dict(default_config(*shape, bits=bits, group_size=group or None))
    split = chosen.pop("SPLIT_K")
    del chosen["BLOCK_M"], chosen["GROUP_M"]
    chosen["BLOCK_C"] = chosen.pop("BLOCK_K") * bits // 128
    types = {
        "x_ptr": "*i64",
        "w_ptr": "*i32",
        "out_ptr": "*fp32" if split > 1 else f"*{kind}",
        **SCALES,
        **END,
        **STRIDES,
        **dict.fromkeys(("N", "CHUNKS", "magic"), "i32"),
    }
    options = {"asymmetric": asymmetric, "bias, gelu, residual": fused, "split K": split > 1}
    return Variant(
        _title(shape, bits, group, kind, options),
        f"{FOLDER}.triton_gemv",
        "gemv_kernel",
        types,
        {
            **_epilogue(group, asymmetric, fused),
            "BITS": bits,
            "KIND": kind,
            "SPLIT_K": split,
            "EVEN": shape[2] * bits // 128 % (chosen["BLOCK_C"] * split) == 0,
        },
        tuple(types),
        chosen,
        architectures=ARCHITECTURES if fused else UNLIKE,
    )


def _gemm(
    shape: tuple[int, int, int],
    bits: int,
    group: int,
    kind: str,
    asymmetric: bool = False,
    fused: bool = False,
    fast: bool = True,
    config: dict[str, int] | None = None,
) -> Variant:
    """The rule's form of a shape; with tiles that one, on the architecture that has wgmma."""
    from octavo.kernels.weight_only_gemm.configs import default_config
    from octavo.kernels.weight_only_gemm.triton import KINDS

    size = 4 if kind == "fp32" else 2
    chosen = config or default_config(
        *shape, bits=bits, group_size=group or None, itemsize=size, fast=fast
    )
    split = chosen["SPLIT_K"] > 1
    types = {
        "x_ptr": WIDE[kind] if fast and bits == 4 else f"*{kind}",
        "w_ptr": "*u8",
        "out_ptr": "*fp32" if split else f"*{kind}",
        **SCALES,
        **END,
        **STRIDES,
        **dict.fromkeys("MNK", "i32"),
    }
    options = {
        "asymmetric": asymmetric,
        "bias, gelu, residual": fused,
        "code by code": not fast,
        "split K": split,
    }
    if config:
        options["by " + "x".join(str(config[f"BLOCK_{axis}"]) for axis in "MNK")] = True
    return Variant(
        _title(shape, bits, group, kind, options),
        f"{FOLDER}.triton_gemm",
        "gemm_kernel",
        types,
        {
            **_epilogue(group, asymmetric, fused),
            "BITS": bits,
            "KIND": dict(KINDS.values())[kind],
            "FAST": fast,
            "EVEN_K": True,
            "stride_xk": 1,
            "stride_wk": 1,
        },
        tuple(name for name in types if name != "M"),
        chosen,
        architectures=(90,) if config else ARCHITECTURES if shape[0] >= 64 else UNLIKE,
    )


def _gather() -> Variant:
    types = {"partial_ptr": "*fp32", "out_ptr": "*bf16", "scale_ptr": "*fp32", **END}
    types |= {"M": "i32", "N": "i32"}
    constants = {"CHANNEL": True, "BIAS": True, "RESIDUAL": False, "ACTIVATION": "silu"}
    return Variant(
        "weight_only_gemm: sum of 4 parts, bias, silu",
        f"{FOLDER}.triton_gemm",
        "gather_kernel",
        types,
        {**constants, "SPLIT_K": 4, "BLOCK_M": 16, "BLOCK_N": 128},
        tuple(types),
    )
