"""The sentence that sums a report up."""

from __future__ import annotations

import math

from octavo.core.results import EngineResult, Report
from octavo.reports.summary import (
    backend_title,
    format_percent,
    format_ratio,
    format_sqnr,
    precision_title,
    size_ratio,
    speed_up,
)

__all__ = ["headline"]

_FLOATS = ("float32", "fp32", "float64", "fp64")
_HALVES = ("float16", "fp16", "bfloat16", "bf16")


def headline(report: Report) -> str:
    """One sentence with the numbers that matter, of the engine that matters.

    That is the fastest INT8 engine; without one the fastest engine of reduced precision, else the
    fastest of all. It is set against the fastest float engine of the same backend where there is
    one, so that the sentence tells what quantization gained and not what leaving PyTorch did;
    what both gained together follows.
    """
    engine = _chosen(report)
    if engine is None:
        return "Only the baseline was measured: the report holds no engine."
    reference = _reference(report, engine)
    facts = _gains(engine, reference, reference is report.baseline)
    overall = speed_up(report.baseline.latency_ms, engine.latency_ms)
    if reference is not report.baseline and overall is not None:
        facts.append(f"{format_ratio(overall)} as fast as the PyTorch baseline")
    facts += _losses(engine)
    subject = f"{precision_title(engine.precision)} on {backend_title(engine.backend)}"
    return f"{subject}: {', '.join(facts) or 'not measured'}."


def _gains(engine: EngineResult, reference: EngineResult, is_baseline: bool) -> list[str]:
    """Size and latency as factors of the reference's."""
    other = f"the {precision_title(reference.precision)} engine of the same backend"
    where = "the PyTorch baseline" if is_baseline else other
    facts = []
    size = size_ratio(engine, reference)
    gain = speed_up(reference.latency_ms, engine.latency_ms)
    if size is not None:
        facts.append(f"{format_ratio(size)} the size")
    if gain is not None:
        facts.append(f"{format_ratio(1 / gain)} the latency")
    return [f"{' and '.join(facts)} of {where}"] if facts else []


def _losses(engine: EngineResult) -> list[str]:
    """What the precision cost, and how much of the engine runs in it."""
    facts = []
    if engine.accuracy is not None:
        sqnr, share = engine.accuracy.sqnr_db, engine.accuracy.top1_agreement
        facts.append("output equal to float" if sqnr == math.inf else f"SQNR {format_sqnr(sqnr)}")
        if share is not None:
            facts.append(f"{format_percent(share)} of the predictions unchanged")
    if "int8" in engine.precision.lower() and engine.layers:
        ran = engine.layers.get("int8", 0)
        total = sum(count for name, count in engine.layers.items() if name != "reformat")
        facts.append(f"{ran or 'none'} of {total} layers in INT8")
    return facts


def _chosen(report: Report) -> EngineResult | None:
    """The engine that the headline is about."""

    def merit(engine: EngineResult) -> tuple[bool, bool, float]:
        precision = engine.precision.lower()
        latency = engine.latency_ms.p50 if engine.latency_ms else math.inf
        return "int8" not in precision, precision in _FLOATS, latency

    return min(report.engines, key=merit, default=None)


def _reference(report: Report, engine: EngineResult) -> EngineResult:
    """The fastest float engine of the same backend, or the baseline where there is none.

    A float32 engine is set against the baseline, and a float16 engine against float32 engines.
    """
    chosen = engine.precision.lower()
    if chosen in _FLOATS:
        return report.baseline
    others = _FLOATS if chosen in _HALVES else (*_FLOATS, *_HALVES)

    def latency(other: EngineResult) -> float:
        return other.latency_ms.p50 if other.latency_ms else math.inf

    floats = [
        other
        for other in report.engines
        if other.backend == engine.backend and other.precision.lower() in others
    ]
    return min(floats, key=latency, default=report.baseline)
