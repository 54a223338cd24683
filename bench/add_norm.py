"""Residual sum and norm: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot import Variant

FORMS = (
    (4096, 768, "bf16", True),
    (4096, 384, "fp32", False),
    (1, 4096, "bf16", True),
    (128, 16384, "bf16", True),
)
"""Rows, their length, dtype, and whether the result is quantized too."""


def static_variants() -> Iterator[Variant]:
    """The forms that the launcher uses."""
    from octavo.kernels.dynamic_quantize.configs import default_config

    for m, n, dtype, quantize in FORMS:
        chosen = {"ROWS": 1, **default_config(m, n)}
        floats = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr")
        types = dict.fromkeys(floats, f"*{dtype}")
        types |= {"codes_ptr": "*i8", "scale_ptr": "*fp32", "M": "i32", "N": "i32"}
        yield Variant(
            f"add_norm: {m}x{n} {dtype}{', quantized' if quantize else ''}",
            "octavo.kernels.add_norm.triton",
            "add_norm_kernel",
            {**types, "eps": "fp32"},
            {"WEIGHT": True, "BIAS": True, "QUANTIZE": quantize, "FMA": True},
            tuple(types),
            chosen,
        )
