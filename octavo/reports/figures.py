"""The four figures of a report, as matplotlib figures; `plots` turns them into files.

Colours are from the palette of Okabe and Ito, which readers with colour-vision deficiency tell
apart, and none of them carries a meaning alone. Every function returns None where the report has
nothing to draw, and expects the settings that `plots` puts in force.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.core.results import LayerSqnr, Report, TensorHistogram, Trial
from octavo.reports.summary import (
    EQUAL_DB,
    clean,
    format_percent,
    format_sqnr,
    is_equal,
    significant,
    trial_value,
    worst_layers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ACCENT", "GREY", "INK", "WARN", "elide", "histograms", "layer_sqnr", "trials"]

INK = "#1a1a1a"
GREY = "#8c8c8c"
PALE = "#d5d9de"
ACCENT = "#0072b2"
WARN = "#d55e00"

_WIDTH = 7.2
_MOST_TENSORS = 12
_MOST_BINS = 128


def elide(text: str, most: int) -> str:
    """The text without its middle where it is longer than `most` characters."""
    text = clean(text)
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def layer_sqnr(report: Report) -> Figure | None:
    """SQNR layer by layer in execution order, the worst five numbered and named."""
    from matplotlib.figure import Figure

    layers = report.layer_sqnr
    if not layers:
        return None
    worst = worst_layers(layers)
    figure = Figure(figsize=(_WIDTH, 3.1 + 0.21 * len(worst)))
    axes = figure.subplots()
    _draw_layers(axes, layers, worst)
    for rank, index in enumerate(worst, start=1):
        layer = layers[index]
        place_below(axes, rank, f"{rank}   {format_sqnr(layer.sqnr_db)}   {elide(layer.name, 68)}")
    return figure


def place_below(axes: Axes, row: int, text: str) -> None:
    """Writes a line of a key below the axes and their label; the first row is 1."""
    axes.annotate(
        text,
        (0, 0),
        xycoords="axes fraction",
        xytext=(0, -36 - 15 * row),
        textcoords="offset points",
    )


def _draw_layers(axes: Axes, layers: Sequence[LayerSqnr], worst: Sequence[int]) -> None:
    """One bar a layer; layers that equal float reach the top in a pale colour."""
    from matplotlib.ticker import MaxNLocator

    values = [layer.sqnr_db for layer in layers]
    finite = [v for v in values if math.isfinite(v) and not is_equal(v)]
    top, low = max([*finite, 1.0]) * 1.15, min([*finite, 0.0])
    heights = [0.0 if math.isnan(v) else min(max(v, low), top) for v in values]
    positions = range(1, len(values) + 1)
    axes.bar(
        positions, heights, width=0.86 if len(values) < 120 else 1.0, color=_colours(values, worst)
    )
    axes.set_xlim(0.2, len(values) + 0.8)
    axes.set_ylim(low * 1.1, top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("SQNR (dB)")
    equal = f"; pale: equal to float (over {EQUAL_DB:.0f} dB)" if any(map(is_equal, values)) else ""
    axes.set_xlabel(f"layer in execution order{equal}")
    _number_worst(axes, heights, worst)


def _colours(values: Sequence[float], worst: Sequence[int]) -> list[str]:
    """The colour of each bar."""
    return [
        WARN if index in set(worst) else PALE if is_equal(value) else ACCENT
        for index, value in enumerate(values)
    ]


def _number_worst(axes: Axes, heights: Sequence[float], worst: Sequence[int]) -> None:
    """Ranks above all bars, side by side, with a thin line to their bars."""
    limit = len(heights) + 0.5
    gap = 0.022 * limit
    order = sorted(worst)
    places = [index + 1.0 for index in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        most = limit if i == len(places) - 1 else places[i + 1] - gap
        places[i] = min(places[i], most)
    top = axes.get_ylim()[1]
    for index, place in zip(order, places, strict=True):
        foot = (index + 1, max(heights[index], 0.0))
        axes.annotate(
            str(worst.index(index) + 1),
            foot,
            xytext=(place, top),
            ha="center",
            va="bottom",
            color=WARN,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": WARN, "linewidth": 0.8, "shrinkB": 0},
        )


def trials(report: Report) -> Figure | None:
    """The candidates that calibration compared, as bars; the chosen one is dark."""
    from matplotlib.figure import Figure

    if not report.trials:
        return None
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.42 * len(report.trials)))
    axes = figure.subplots()
    finite = [t.sqnr_db for t in report.trials if math.isfinite(t.sqnr_db)]
    top, low = max([*finite, 1.0]), min([*finite, 0.0])
    for row, trial in enumerate(report.trials):
        _draw_trial(axes, row, trial, low, top)
    axes.set_xlim(low * 1.05, top * 1.05)
    axes.set_xlabel("SQNR at the output on held-back data (dB)")
    if not finite:
        axes.set_xticks([])
    values = [f"{trial_value(t)}{', chosen' if t.chosen else ''}" for t in report.trials]
    _name_rows(axes, [elide(trial.name, 40) for trial in report.trials])
    _name_rows(axes.twinx(), values)
    for side in figure.axes:
        for label, trial in zip(side.get_yticklabels(), report.trials, strict=True):
            label.set_fontweight("bold" if trial.chosen else "normal")
    return figure


def _draw_trial(axes: Axes, row: int, trial: Trial, low: float, top: float) -> None:
    """One bar."""
    value = min(max(0.0 if math.isnan(trial.sqnr_db) else trial.sqnr_db, low), top)
    axes.barh(row, value, height=0.62, color=ACCENT if trial.chosen else PALE)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names on the y axis, the first row at the top."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)))
    axes.set_yticklabels(names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def histograms(report: Report) -> Figure | None:
    """Distributions of a few tensors with logarithmic counts, and the range that was chosen."""
    from matplotlib.figure import Figure

    tensors = [t for t in report.histograms if sum(t.counts) > 0][:_MOST_TENSORS]
    if not tensors:
        return None
    columns = 1 if len(tensors) == 1 else 2
    rows = -(-len(tensors) // columns)
    figure = Figure(figsize=(_WIDTH, 0.35 + 2.15 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, tensor in zip(grid, tensors, strict=False):
        _draw_histogram(axes, tensor)
    for axes in grid[len(tensors) :]:
        axes.set_visible(False)
    return figure


def _draw_histogram(axes: Axes, tensor: TensorHistogram) -> None:
    """One tensor: bars of counts, the range as two lines, what lies outside it shaded."""
    edges, counts = _merge_bins(tensor.edges, tensor.counts)
    axes.stairs(counts, edges, fill=True, color=PALE, baseline=0.5)
    axes.stairs(counts, edges, color=GREY, linewidth=0.8, baseline=0.5)
    first, last = edges[0], edges[-1]
    span = (last - first) or 1.0
    left, right = first - 0.05 * span, last + 0.05 * span
    for bound in (tensor.low, tensor.high):
        if left - 0.3 * span <= bound <= right + 0.3 * span:
            left, right = min(left, bound - 0.03 * span), max(right, bound + 0.03 * span)
            axes.axvline(bound, color=WARN, linewidth=1.5)
    axes.axvspan(left, max(left, tensor.low), color=WARN, alpha=0.1, linewidth=0)
    axes.axvspan(min(right, tensor.high), right, color=WARN, alpha=0.1, linewidth=0)
    axes.set_xlim(left, right)
    axes.set_yscale("log")
    axes.set_ylim(0.5, 3 * max(counts))
    _powers_of_ten(axes)
    bounds = f"{significant(tensor.low)} to {significant(tensor.high)}"
    axes.set_title(f"{elide(tensor.name, 38)}\n", loc="left", fontweight="bold", fontsize=9)
    axes.annotate(
        f"{elide(tensor.observer, 18)}: {bounds}; {_clipped(tensor)} clipped",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=8.5,
    )


def _powers_of_ten(axes: Axes) -> None:
    """Ticks 1, 100, 10⁴ ... on a logarithmic count axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    digits = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    high = int(math.log10(max(axes.get_ylim()[1], 1)))
    step = 1 if high < 4 else 2
    axes.yaxis.set_major_locator(FixedLocator([10.0**p for p in range(0, high + 1, step)]))
    axes.yaxis.set_minor_locator(NullLocator())

    def text(value: float, _position: int | None) -> str:
        power = round(math.log10(value))
        return f"{value:.0f}" if power < 3 else f"10{str(power).translate(digits)}"

    axes.yaxis.set_major_formatter(FuncFormatter(text))


def _merge_bins(edges: Sequence[float], counts: Sequence[int]) -> tuple[list[float], list[int]]:
    """The histogram with neighbouring bins summed, so that at most 128 remain."""
    group = -(-len(counts) // _MOST_BINS)
    starts = range(0, len(counts), group)
    merged = [sum(counts[i : i + group]) for i in starts]
    return [edges[i] for i in starts] + [edges[len(counts)]], merged


def _clipped(tensor: TensorHistogram) -> str:
    """The share of values outside the range, from bins that lie outside it as a whole."""
    low, high = min(tensor.low, tensor.high), max(tensor.low, tensor.high)
    pairs = zip(tensor.edges[:-1], tensor.edges[1:], tensor.counts, strict=True)
    outside = sum(n for a, b, n in pairs if (a < low and b <= low) or (b > high and a >= high))
    if outside == 0:
        return "none"
    share = outside / sum(tensor.counts)
    if share >= 0.001:
        return format_percent(share)
    return f"{significant(100 * share, 1)} %" if share >= 1e-5 else "under 0.001 %"
