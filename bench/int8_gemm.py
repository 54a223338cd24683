"""INT8 matrix product: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.aot import Variant

EPILOGUE = {"TOKEN": True, "CHANNEL": True, "RAW": False, "REQUANTIZE": False}
POINTERS = {
    "scale_x_ptr": "*fp32",
    "scale_w_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "residual_ptr": "*bf16",
    "out_scale_ptr": "*fp32",
    "M": "i32",
    "N": "i32",
}


def static_variants() -> Iterator[Variant]:
    """The forms that the launcher uses."""
    from octavo.kernels.int8_gemm.triton import config

    yield _gemm("1x4096x4096", False, dict(config(1, 4096, 4096)))
    for fused in (False, True):  # wide enough that K is not split, so the epilogue is inside
        yield _gemm("64x28672x4096", fused, dict(config(64, 28672, 4096, heavy=fused)))
        yield _gemm("4096x4096x4096", fused, dict(config(4096, 4096, 4096, heavy=fused)))
    yield _gather()


def _gemm(shape: str, fused: bool, chosen: dict[str, Any]) -> Variant:
    split = chosen["SPLIT_K"] > 1
    end = ", bias, gelu, residual" if fused else ", split K" if split else ""
    types = {"x_ptr": "*i8", "w_ptr": "*i8", "out_ptr": "*i32" if split else "*bf16"}
    strides = {"K": "i32", "stride_xm": "i64", "stride_wn": "i64"}
    return Variant(
        f"int8_gemm: {shape}{end}",
        "octavo.kernels.int8_gemm.triton",
        "_gemm_kernel",
        {**types, **POINTERS, **strides},
        {
            **EPILOGUE,
            "stride_xk": 1,
            "stride_wk": 1,
            "BIAS": fused,
            "RESIDUAL": fused,
            "ACTIVATION": "gelu" if fused else "none",
            "EVEN_K": True,
        },
        (*types, *POINTERS, *strides),
        chosen,
    )


def _gather() -> Variant:
    types = {"partial_ptr": "*i32", "out_ptr": "*bf16", **POINTERS}
    constants = {"BIAS": True, "RESIDUAL": False, "ACTIVATION": "silu", "SPLIT_K": 4}
    return Variant(
        "int8_gemm: sum of 4 parts, bias, silu",
        "octavo.kernels.int8_gemm.triton",
        "_gather_kernel",
        types,
        {**EPILOGUE, **constants, "BLOCK_M": 16, "BLOCK_N": 128},
        tuple(types),
    )
