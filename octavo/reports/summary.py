"""Numbers as a reader wants them: ratios to the baseline, and units.

The console and the HTML file both show what is computed here, so they cannot disagree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from octavo.core.results import Accuracy, EngineResult, LatencyMs, LayerSqnr, Report, Trial

__all__ = [
    "EQUAL_DB",
    "NONE",
    "Row",
    "all_notes",
    "backend_title",
    "bits",
    "clean",
    "engine_rows",
    "format_layers",
    "format_percent",
    "format_ratio",
    "format_seconds",
    "format_size",
    "format_spread",
    "format_sqnr",
    "int8_layers",
    "precision_title",
    "significant",
    "size_ratio",
    "speed_up",
    "trial_value",
    "worst_layers",
]

NONE = "–"
"""Shown where something was not measured."""

EQUAL_DB = 60.0
"""From this SQNR on a plot treats a result as equal to float: noise is a thousandth of the signal
or less, which is what another order of summation in float arithmetic may give."""

_BACKENDS = {
    "onnxruntime": "ONNX Runtime",
    "pytorch": "PyTorch",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
}


@dataclass(frozen=True)
class Row:
    """One line of the results table, as text.

    Attributes:
        result: what the line shows.
        size: on disk, with its unit.
        size_ratio: size over the baseline's size; the smaller the better.
        latency: median of one call, with its unit.
        spread: the 20th and the 80th percentile, in the same unit.
        speed_up: the baseline's median over this median; the larger the better.
        sqnr: signal to quantization noise at the output.
        agreement: share of equal predictions.
        top1: share of right predictions.
        max_error: the largest absolute difference of an output value.
    """

    result: EngineResult
    size: str
    size_ratio: str
    latency: str
    spread: str
    speed_up: str
    sqnr: str
    agreement: str
    top1: str
    max_error: str


def clean(text: str) -> str:
    """The text on one line: white space as blanks, control codes and the like replaced."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def significant(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits and no exponent where a reader can do without."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, NONE)
    if round(abs(value)) >= 10**digits:
        text = f"{value:.0f}" if abs(value) < 1e9 else f"{value:.{digits - 1}e}"
    else:
        text = f"{value:#.{digits}g}".rstrip(".")
        if "e+" in text:  # 999.7 rounds up to 1.00e+03
            text = f"{value:.0f}"
    return text.replace("-", "−", 1) if value < 0 else text


def format_size(count: int) -> str:
    """Bytes in the largest decimal unit that leaves a number of at least one."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{significant(count / 10**power)} {unit}"
    return f"{count} B"


def format_ratio(value: float | None) -> str:
    """A factor with two decimals, or with more where they would hide its size."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.2f}×" if 0.1 <= value < 10 else f"{significant(value, 2 + (value >= 10))}×"


def format_percent(share: float | None) -> str:
    """A share of one as a percentage; only a share of exactly one reads as 100 %."""
    if share is None or not math.isfinite(share):
        return NONE
    percent = round(100 * share, 1)
    if share < 1:
        percent = min(percent, 99.9)
    return f"{percent:.1f} %"


def format_seconds(seconds: float) -> str:
    """A duration in seconds, or in minutes from two minutes on."""
    return f"{significant(seconds)} s" if seconds < 120 else f"{significant(seconds / 60)} min"


def format_sqnr(sqnr_db: float | None, equal: str = "equal to float") -> str:
    """An SQNR with its unit; `equal` where it is infinite."""
    if sqnr_db is None or math.isnan(sqnr_db):
        return NONE
    if math.isinf(sqnr_db):
        return equal if sqnr_db > 0 else "−∞ dB"
    return f"{sqnr_db:.1f} dB".replace("-", "−")


def format_spread(latency: LatencyMs | None) -> str:
    """The 20th and the 80th percentile of the latency, in milliseconds."""
    if latency is None:
        return NONE
    return f"{significant(latency.p20)}–{significant(latency.p80)}"


def format_layers(layers: Mapping[str, int]) -> list[str]:
    """One text a precision ("53 int8"), the commonest first and reformats last."""
    order = sorted(layers.items(), key=lambda item: (item[0] == "reformat", -item[1], item[0]))
    return [f"{count} {clean(precision)}" for precision, count in order]


def backend_title(backend: str) -> str:
    """The name that a backend goes by in prose."""
    return _BACKENDS.get(backend, clean(backend))


def precision_title(precision: str) -> str:
    """The name of a precision in prose."""
    return clean(precision).replace("int8", "INT8").replace("int4", "INT4")


def speed_up(baseline: LatencyMs | None, latency: LatencyMs | None) -> float | None:
    """The baseline's median over this median; None where one is missing or zero."""
    if baseline is None or latency is None or latency.p50 <= 0 or baseline.p50 <= 0:
        return None
    return baseline.p50 / latency.p50


def size_ratio(result: EngineResult, reference: EngineResult) -> float | None:
    """Size over the reference's size; None where that is zero."""
    return result.size_bytes / reference.size_bytes if reference.size_bytes > 0 else None


def bits(precision: str) -> int:
    """Width of the narrowest type in a precision ("int8+float16": 8); 99 where none is known."""
    return min(map(int, re.findall(r"\d+", precision)), default=99)


def int8_layers(result: EngineResult) -> tuple[int, int]:
    """How many layers run in INT8, and how many compute at all."""
    computing = sum(count for name, count in result.layers.items() if name != "reformat")
    return result.layers.get("int8", 0), computing


def all_notes(report: Report) -> list[str]:
    """The notes of the report, then those of each engine with its name."""
    results = (report.baseline, *report.engines)
    return [*report.notes, *(f"{one.name}: {note}" for one in results for note in one.notes)]


def trial_value(trial: Trial) -> str:
    """SQNR, agreement where there is one, and duration of a trial, on one line."""
    parts = [format_sqnr(trial.sqnr_db)]
    if trial.top1_agreement is not None:
        parts.append(format_percent(trial.top1_agreement))
    return ", ".join([*parts, format_seconds(trial.seconds)])


def worst_layers(layers: tuple[LayerSqnr, ...], count: int = 5) -> list[int]:
    """Indices of the `count` layers of lowest SQNR, the worst first; undefined ones never count."""
    noisy = [i for i, layer in enumerate(layers) if layer.sqnr_db <= EQUAL_DB]
    return sorted(noisy, key=lambda i: (layers[i].sqnr_db, i))[:count]


def engine_rows(report: Report) -> list[Row]:
    """The lines of the results table: the baseline, then every engine in its order."""
    baseline = report.baseline
    return [_row(result, baseline) for result in (baseline, *report.engines)]


def _row(result: EngineResult, baseline: EngineResult) -> Row:
    """One line of the results table."""
    is_baseline = result is baseline
    latency = result.latency_ms
    accuracy = result.accuracy or Accuracy(math.nan, math.nan, math.nan)
    return Row(
        result=result,
        size=format_size(result.size_bytes),
        size_ratio=format_ratio(size_ratio(result, baseline)),
        latency=f"{significant(latency.p50)} ms" if latency else NONE,
        spread=format_spread(latency),
        speed_up=format_ratio(speed_up(baseline.latency_ms, latency)),
        sqnr="reference" if is_baseline else format_sqnr(accuracy.sqnr_db),
        agreement="reference" if is_baseline else format_percent(accuracy.top1_agreement),
        top1=format_percent(accuracy.top1_accuracy),
        max_error=NONE if is_baseline else significant(accuracy.max_error, 2),
    )
