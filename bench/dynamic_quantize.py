"""Quantization at run time: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.aot import ARCHITECTURES, UNLIKE, Variant

POINTERS = {
    "total_ptr": "*bf16",
    "residual_ptr": "*bf16",
    "weight_ptr": "*bf16",
    "bias_ptr": "*bf16",
    "smooth_ptr": "*fp32",
    "peaks_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "codes_ptr": "*i8",
}
SIZES = {"M": "i32", "K": "i32", "stride_outer": "i32", "stride_inner": "i32", "up": "i32"}
PLAIN = {
    "NORM": "none",
    "WEIGHT": False,
    "BIAS": False,
    "ACTIVATION": "none",
    "SMOOTH": False,
    "ADD": False,
    "MODE": "token",
}
RMS = {"NORM": "rms", "WEIGHT": True}
LAYER = {"NORM": "layer", "WEIGHT": True, "BIAS": True}
FORMS: tuple[tuple[str, int, int, str, dict[str, Any]], ...] = (
    ("", 8192, 768, "bf16", {}),
    ("", 8192, 4096, "bf16", {}),
    ("", 1, 28672, "bf16", {}),
    (", smooth", 8192, 16384, "bf16", {"SMOOTH": True}),
    (", peak", 8192, 4096, "bf16", {"MODE": "peak"}),
    (", per tensor", 8192, 4096, "bf16", {"MODE": "tensor"}),
    (", add, rms", 8192, 8192, "bf16", {**RMS, "ADD": True}),
    (", add, layer norm, smooth", 1, 16384, "fp32", {**LAYER, "ADD": True, "SMOOTH": True}),
    (", add, layer norm, smooth", 1, 28672, "bf16", {**LAYER, "ADD": True, "SMOOTH": True}),
    (", gelu", 8192, 3072, "bf16", {"ACTIVATION": "gelu"}),
    (", silu-mul, smooth", 8192, 53248, "bf16", {"ACTIVATION": "silu-mul", "SMOOTH": True}),
)
"""Title, rows, their length, dtype and what is fused."""


def static_variants() -> Iterator[Variant]:
    """The forms that the launcher uses."""
    from octavo.kernels.dynamic_quantize.configs import default_config
    from octavo.kernels.dynamic_quantize.triton import PARTS

    for title, m, k, dtype, fused in FORMS:
        chosen = dict(default_config(m, k))
        types = {"x_ptr": f"*{dtype}", **POINTERS, **SIZES}
        if m == 1:
            del types["M"]
        yield Variant(
            f"dynamic_quantize: {m}x{k} {dtype}{title}",
            "octavo.kernels.dynamic_quantize.triton_rows",
            "rows_kernel" if "ROWS" in chosen else "long_row_kernel",
            {**types, "parts": "i32", "eps": "fp32"},
            {
                **({"M": 1} if m == 1 else {}),
                **PLAIN,
                **fused,
                "inner": 1,
                "stride_k": 1,
                "PARTS": PARTS,
                "FMA": True,
            },
            tuple(types),
            chosen,
            architectures=ARCHITECTURES if len(fused) > 1 else UNLIKE,
        )
