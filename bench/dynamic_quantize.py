"""Quantization at run time: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.aot import Variant

POINTERS = {"smooth_ptr": "*fp32", "peaks_ptr": "*fp32", "scale_ptr": "*fp32", "codes_ptr": "*i8"}
SIZES = ("M", "K", "parts", "inner", "stride_outer", "stride_inner")
FORMS: tuple[tuple[str, int, int, str, dict[str, Any]], ...] = (
    ("", 8192, 768, "bf16", {}),
    ("", 8192, 4096, "bf16", {}),
    ("", 1, 28672, "bf16", {}),
    (", smooth", 8192, 16384, "bf16", {"SMOOTH": True}),
    (", smooth", 1, 28672, "bf16", {"SMOOTH": True}),
    (", smooth", 512, 28672, "fp32", {"SMOOTH": True}),
    (", peak", 8192, 4096, "bf16", {"MODE": "peak"}),
    (", per tensor", 8192, 4096, "bf16", {"MODE": "tensor"}),
)
"""Title, rows, their length, dtype and what is asked for."""


def static_variants() -> Iterator[Variant]:
    """The forms that the launcher uses."""
    from octavo.kernels.dynamic_quantize.configs import default_config
    from octavo.kernels.dynamic_quantize.triton import PARTS

    for title, m, k, dtype, asked in FORMS:
        chosen = dict(default_config(m, k))
        ones = {"inner": 1, "stride_k": 1} | ({"M": 1} if m == 1 else {})
        sizes = dict.fromkeys((name for name in SIZES if name not in ones), "i32")
        yield Variant(
            f"dynamic_quantize: {m}x{k} {dtype}{title}",
            "octavo.kernels.dynamic_quantize.triton_rows",
            "rows_kernel" if "ROWS" in chosen else "long_row_kernel",
            {"x_ptr": f"*{dtype}", **POINTERS, **sizes},
            {"SMOOTH": False, "MODE": "token", "PARTS": PARTS, "FMA": True, **ones, **asked},
            ("x_ptr", *POINTERS, *(name for name in sizes if name != "parts")),
            chosen,
        )
