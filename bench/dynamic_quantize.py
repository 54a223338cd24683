"""Quantization at run time: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.aot import Variant


def static_variants() -> Iterator[Variant]:
    """The forms that the launcher uses."""
    from octavo.kernels.dynamic_quantize.triton import config

    for k in (1024, 8192, 16384):
        for smooth in (False, True):
            title = f"K {k}, smooth" if smooth else f"K {k}"
            yield _row_kernel(f"bf16, {title}", "bf16", smooth, dict(config(k)))
    yield _row_kernel("fp32, K 4096", "fp32", False, dict(config(4096)))


def _row_kernel(name: str, dtype: str, smooth: bool, chosen: dict[str, Any]) -> Variant:
    return Variant(
        f"dynamic_quantize: {name}",
        "octavo.kernels.dynamic_quantize.triton",
        "_row_kernel",
        {
            "x_ptr": f"*{dtype}",
            "smooth_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "codes_ptr": "*i8",
            "K": "i32",
            "stride_m": "i64",
        },
        {"stride_k": 1, "SMOOTH": smooth, "FIND": True, "WRITE": True, "ROW_SCALE": True},
        ("x_ptr", "smooth_ptr", "scale_ptr", "codes_ptr", "K", "stride_m"),
        chosen,
    )
