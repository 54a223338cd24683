"""The sentence that sums a report up."""

from __future__ import annotations

import math

from octavo.core.results import EngineResult, Report
from octavo.reports.summary import (
    backend_title,
    bits,
    format_percent,
    format_ratio,
    format_sqnr,
    int8_layers,
    precision_title,
    size_ratio,
    speed_up,
)

__all__ = ["headline"]


def headline(report: Report) -> str:
    """One sentence with the numbers that matter, of the engine that matters.

    That is the fastest INT8 engine; without one the fastest engine of reduced precision, else the
    fastest of all. It is set against the fastest float engine of the same backend where there is
    one, so that the sentence tells what quantization gained and not what leaving PyTorch did;
    what both gained together follows.
    """
    engine = min(report.engines, key=_merit, default=None)
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


def _merit(engine: EngineResult) -> tuple[bool, bool, float]:
    """Smaller for an engine that tells more: INT8, then reduced precision, then the fastest."""
    return "int8" not in engine.precision, bits(engine.precision) >= 32, _latency(engine)


def _latency(engine: EngineResult) -> float:
    return engine.latency_ms.p50 if engine.latency_ms else math.inf


def _reference(report: Report, engine: EngineResult) -> EngineResult:
    """The fastest float engine of the same backend and more bits, or else the baseline."""
    least = max(bits(engine.precision) + 1, 16)
    floats = [
        other
        for other in report.engines
        if other.backend == engine.backend and bits(other.precision) >= least
    ]
    return min(floats, key=_latency, default=report.baseline)


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
    if "int8" in engine.precision and engine.layers:
        ran, total = int8_layers(engine)
        facts.append(f"{ran or 'none'} of {total} layers in INT8")
    return facts
