"""The four figures of a report, as matplotlib figures; `plots` turns them into files.

Colours are from the palette of Okabe and Ito, which readers with colour-vision deficiency tell
apart, and none of them carries a meaning alone. Every function returns None where the report has
nothing to draw, and expects the settings that `plots` puts in force.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from octavo.core.results import LatencyMs, Report, TensorHistogram
from octavo.reports.summary import (
    EQUAL_DB,
    NONE,
    Row,
    bits,
    clean,
    engine_rows,
    format_percent,
    format_sqnr,
    precision_title,
    significant,
    trial_value,
    worst_layers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GREY", "INK", "accuracy_latency", "elide", "histograms", "layer_sqnr", "trials"]

INK = "#1a1a1a"
GREY = "#8c8c8c"
PALE = "#d5d9de"
ACCENT = "#0072b2"
WARN = "#d55e00"

_STYLES = {4: (WARN, "v"), 8: (ACCENT, "o"), 16: ("#e69f00", "^"), 32: (GREY, "s")}
"""Colour and marker of an engine by the bits of its precision."""

_WIDTH = 7.2
_LOWEST_DB = -20.0
_BAND_DB = 12.0
_MOST_TENSORS = 12
_MOST_BINS = 128


def elide(text: str, most: int) -> str:
    """The text without its middle where it is longer than `most` characters."""
    text = clean(text)
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def accuracy_latency(report: Report) -> Figure | None:
    """Latency and SQNR of the baseline and every engine, one row each.

    Engines without latency or accuracy are left out; None where no engine is left. The baseline
    counts as equal to float, and whatever does stands in a band of its own at the right edge; what
    is below -20 dB stands at the left edge.
    """
    from matplotlib.figure import Figure

    points = _points(report)
    if all(row.result is report.baseline for row, _, _ in points):
        return None
    names = [textwrap.fill(elide(row.result.name, 78), 26) for row, _, _ in points]
    values = [_accuracy(row) for row, _, _ in points]
    most_lines = 1 + max(text.count("\n") for text in (*names, *values))
    figure = Figure(figsize=(_WIDTH, 1.3 + (0.1 + 0.15 * most_lines) * len(points)))
    left, right = figure.subplots(1, 2)
    legend: dict[tuple[str, str], list[str]] = {}
    for place, (row, latency, sqnr) in enumerate(points):
        precision = row.result.precision
        colour, marker = style = _STYLES.get(bits(precision), ("#009e73", "D"))
        legend.setdefault(style, []).append(precision_title(precision))
        times = [latency.p20, latency.p50, latency.p80]
        left.plot(times, [place] * 3, color=colour, marker=marker, markevery=[1])
        shown = max(sqnr, _LOWEST_DB) if sqnr <= EQUAL_DB else EQUAL_DB + _BAND_DB / 2
        right.plot(shown, place, color=colour, marker=marker)
    for (colour, marker), titles in legend.items():
        label = ", ".join(dict.fromkeys(titles))
        left.plot([], [], color=colour, marker=marker, linestyle="none", label=label)
    figure.legend(loc="outside upper left", ncols=len(legend), frameon=False, handletextpad=0)
    _latency_axis(left, [latency for _, latency, _ in points])
    _sqnr_axis(right, min(sqnr for _, _, sqnr in points))
    _name_rows(left, names)
    _name_rows(right, values)
    right.yaxis.tick_right()
    return figure


def _points(report: Report) -> list[tuple[Row, LatencyMs, float]]:
    """The rows that have a place in the figure, with their latency and SQNR."""
    points = []
    for row in engine_rows(report):
        latency, accuracy = row.result.latency_ms, row.result.accuracy
        measured = accuracy.sqnr_db if accuracy else math.nan
        sqnr = math.inf if row.result is report.baseline else measured
        if latency is not None and latency.p50 > 0 and sqnr > -math.inf:
            points.append((row, latency, sqnr))
    return points


def _accuracy(row: Row) -> str:
    """SQNR, and the share of equal predictions where there is one."""
    same = row.agreement in (NONE, row.sqnr)
    return row.sqnr if same else f"{row.sqnr}\n{row.agreement} same top-1"


def _latency_axis(axes: Axes, latencies: Sequence[LatencyMs]) -> None:
    """A logarithmic axis where the latencies are far apart; plain numbers either way."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(i.p20 for i in latencies), max(i.p80 for i in latencies)
    axes.margins(x=0.1)
    if low > 0 and high / low > 4:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("latency of one call (ms), median and\np20 to p80 as a line; left is faster")


def _sqnr_axis(axes: Axes, lowest: float) -> None:
    """Zero to what counts as equal to float, with a shaded band beyond."""
    low = max(min(lowest, 0.0), _LOWEST_DB)
    axes.set_xlim(low - 4, EQUAL_DB + _BAND_DB)
    axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= EQUAL_DB])
    axes.axvspan(EQUAL_DB, EQUAL_DB + _BAND_DB, color=PALE, alpha=0.5, linewidth=0)
    axes.set_title(f"equal to float (> {EQUAL_DB:.0f} dB)", loc="right", fontsize=9)
    axes.set_xlabel("SQNR (dB),\nright is closer to float")


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names on the y axis, the first row at the top."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)


def layer_sqnr(report: Report) -> Figure | None:
    """SQNR layer by layer in execution order, the worst five in another colour and named."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = report.layer_sqnr
    if not layers:
        return None
    worst = worst_layers(layers)
    figure = Figure(figsize=(_WIDTH, 3.3 + 0.2 * len(worst)))
    axes = figure.subplots()
    values = [layer.sqnr_db for layer in layers]
    lengths, low, top = _bars(values)
    colours = [
        WARN if index in worst else PALE if value > EQUAL_DB else ACCENT
        for index, value in enumerate(values)
    ]
    width = 0.86 if len(layers) < 120 else 1.0
    axes.bar(range(1, len(layers) + 1), lengths, width=width, color=colours)
    axes.set_xlim(0.2, len(layers) + 0.8)
    axes.set_ylim(low, top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("SQNR (dB)")
    text = "layer in execution order"
    if PALE in colours:
        text += f"; pale: equal to float (over {EQUAL_DB:.0f} dB)"
    if worst:
        text += "; orange: the lowest, named below"
    for index in worst:
        layer = layers[index]
        number = f"{index + 1:\N{FIGURE SPACE}>{len(str(len(layers)))}}"
        text += f"\n{number}   {format_sqnr(layer.sqnr_db)}   {elide(layer.name, 68)}"
    axes.set_xlabel(text, loc="left", linespacing=1.5)
    return figure


def _bars(values: Sequence[float]) -> tuple[Sequence[float], float, float]:
    """Lengths of bars that show SQNRs, and the limits of their axis.

    What equals float reaches the end of the axis, and an undefined SQNR has no bar.
    """
    noisy = [value for value in values if math.isfinite(value) and value <= EQUAL_DB]
    low = 1.1 * min([*noisy, 0.0])
    top = 1.15 * max((value for value in noisy if value > 0), default=EQUAL_DB)
    return np.clip(np.nan_to_num(values), low, top).tolist(), low, top


def trials(report: Report) -> Figure | None:
    """The candidates that calibration compared, as bars; the chosen one is dark."""
    from matplotlib.figure import Figure

    found = report.trials
    if not found:
        return None
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.42 * len(found)))
    axes = figure.subplots()
    lengths, low, top = _bars([trial.sqnr_db for trial in found])
    colours = [ACCENT if trial.chosen else PALE for trial in found]
    axes.barh(range(len(found)), lengths, height=0.62, color=colours)
    axes.set_xlim(low, top)
    axes.set_xlabel("SQNR at the output on held-back data (dB)")
    _name_rows(axes, [elide(trial.name, 40) for trial in found])
    values = [f"{trial_value(trial)}{', chosen' if trial.chosen else ''}" for trial in found]
    _name_rows(axes.twinx(), values)
    for side in figure.axes:
        side.grid(axis="y", visible=False)
        for label, trial in zip(side.get_yticklabels(), found, strict=True):
            label.set_fontweight("bold" if trial.chosen else "normal")
    return figure


def histograms(report: Report) -> Figure | None:
    """Distributions of a few tensors with logarithmic counts, and the range that was chosen."""
    from matplotlib.figure import Figure

    tensors = [t for t in report.histograms if sum(t.counts) > 0][:_MOST_TENSORS]
    if not tensors:
        return None
    columns = 1 if len(tensors) == 1 else 2
    rows = -(-len(tensors) // columns)
    figure = Figure(figsize=(_WIDTH, 0.35 + 2.15 * rows))
    for place, tensor in enumerate(tensors, start=1):
        _draw_histogram(figure.add_subplot(rows, columns, place), tensor)
    return figure


def _draw_histogram(axes: Axes, tensor: TensorHistogram) -> None:
    """One tensor: bars of counts, the range as two lines, what lies outside it shaded."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    # Neighbouring bins are summed, so that at most 128 remain.
    starts = np.arange(0, len(tensor.counts), -(-len(tensor.counts) // _MOST_BINS))
    counts = np.add.reduceat(tensor.counts, starts)
    edges = [*np.take(tensor.edges, starts), tensor.edges[-1]]
    axes.stairs(
        counts, edges, fill=True, facecolor=PALE, edgecolor=GREY, linewidth=0.8, baseline=0.5
    )
    first, last = edges[0], edges[-1]
    span = (last - first) or 1.0
    left = min(max(tensor.low, first - 0.3 * span), first) - 0.05 * span
    right = max(min(tensor.high, last + 0.3 * span), last) + 0.05 * span
    for bound, end in ((tensor.low, left), (tensor.high, right)):
        axes.axvline(bound, color=WARN, linewidth=1.5)
        axes.axvspan(end, bound, color=WARN, alpha=0.1, linewidth=0)
    axes.set_xlim(left, right)
    axes.set_yscale("log")
    axes.set_ylim(0.5, 3 * max(counts))
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.set_title(elide(tensor.name, 38), loc="left", fontweight="bold", fontsize=9)
    bounds = f"{significant(tensor.low)} to {significant(tensor.high)}"
    axes.set_xlabel(f"{elide(tensor.observer, 18)}: {bounds}; {_clipped(tensor)} clipped")


def _clipped(tensor: TensorHistogram) -> str:
    """The share of values outside the range, from the middles of the bins."""
    middles = (np.array(tensor.edges[:-1]) + tensor.edges[1:]) / 2
    outside = (middles < tensor.low) | (middles > tensor.high)
    share = float(np.sum(tensor.counts, where=outside) / np.sum(tensor.counts))
    if share == 0:
        return "none"
    if share >= 0.001:
        return format_percent(share)
    return f"{significant(100 * share, 1)} %" if share >= 1e-5 else "under 0.001 %"
