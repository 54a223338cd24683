"""Results to report on, shared by the tests of this folder."""

from __future__ import annotations

from octavo.core.results import Accuracy, EngineResult, LatencyMs

HOSTILE = "<script>alert('x')</script> & \"quotes\" [bold]b[/bold] $x_1$ :smile: \x1b[31m\x00"
"""A name that breaks whatever does not escape it: HTML, markup of rich, formulas of matplotlib."""


def make_engine(
    name: str,
    precision: str = "int8",
    p50: float = 3.1,
    sqnr_db: float = 18.9,
    agreement: float | None = 0.961,
    backend: str = "onnxruntime",
    size: int = 4_940_000,
) -> EngineResult:
    return EngineResult(
        name,
        backend,
        precision,
        size,
        LatencyMs(p50 * 0.97, p50, p50 * 1.06, 400),
        Accuracy(sqnr_db, 0.4123, 0.9936, agreement, 0.7482),
        {"int8": 56, "float32": 4, "reformat": 5} if precision == "int8" else {precision: 60},
        notes=("classifier.1 stays in float32.",),
    )
