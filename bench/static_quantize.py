"""Quantization with calibrated scales: the variants that the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot import Variant


def static_variants() -> Iterator[Variant]:
    """The forms that the launcher uses."""
    from octavo.kernels.static_quantize.triton import BLOCK

    for channel in (False, True):
        pointers = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "codes_ptr": "*i8"}
        yield Variant(
            f"static_quantize: bf16, a scale a {'channel' if channel else 'tensor'}",
            "octavo.kernels.static_quantize.triton",
            "_kernel",
            {**pointers, "size": "i32", "K": "i32", "zero_point": "i32"},
            {"CHANNEL": channel, "BLOCK": BLOCK},
            (*pointers, "size", "K"),
            {"num_warps": 8},
        )
