"""Accuracy against latency: one labelled point an engine."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.core.results import EngineResult, LatencyMs, Report
from octavo.reports._labels import Box, place
from octavo.reports.figures import ACCENT, GREY, INK, WARN, elide, place_below
from octavo.reports.summary import EQUAL_DB, format_percent, format_sqnr, is_equal, precision_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_latency"]

_STYLES = {
    "int8": (ACCENT, "o"),
    "float16": ("#e69f00", "^"),
    "float32": (GREY, "s"),
    "int4": (WARN, "v"),
}
_OTHER = ("#009e73", "D")
_BASELINE = "baseline"


@dataclass(frozen=True)
class _Point:
    """One engine: where it is drawn and what stands beside it."""

    name: str
    latency: LatencyMs
    sqnr_db: float
    facts: str
    kind: str

    @property
    def equal(self) -> bool:
        """Whether it belongs to the band of results that equal float."""
        return is_equal(self.sqnr_db)

    @property
    def label(self) -> str:
        """Its name in short lines, then the facts."""
        return "\n".join([*textwrap.wrap(self.name, 26), self.facts])

    @property
    def style(self) -> tuple[str, str]:
        """Colour and marker of its precision."""
        return _STYLES.get(self.kind, _OTHER)


@dataclass(frozen=True)
class _Spot:
    """A point on its axes; `height` is on the y scale of those."""

    axes: Axes
    point: _Point
    height: float

    def pixels(self, latency: float) -> tuple[float, float]:
        """Where a latency of this point lies in the figure."""
        x, y = self.axes.transData.transform((latency, self.height))
        return float(x), float(y)

    def box(self, reach: float) -> Box:
        """What the marker and the line from p20 to p80 cover."""
        latency = self.point.latency
        (left, y), (right, _) = self.pixels(latency.p20), self.pixels(latency.p80)
        middle, _ = self.pixels(latency.p50)
        return Box(min(left, middle - reach), y - reach, max(right, middle + reach), y + reach)


def accuracy_latency(report: Report) -> Figure | None:
    """SQNR against median latency; what equals float stands in a band of its own at the top.

    Engines without latency or accuracy are left out, and the baseline counts as equal to float.
    Each point is labelled where the labels have room, else numbered with a key below the plot.
    None where no engine is left.
    """
    found = (
        _point(result, result is report.baseline) for result in (report.baseline, *report.engines)
    )
    points = [point for point in found if point is not None]
    if not points or (len(points) == 1 and points[0].facts == _BASELINE):
        return None
    labelled = _figure(points, [point.label for point in points])
    if labelled is not None:
        return labelled
    numbers = [str(number) for number in range(1, len(points) + 1)]
    return _figure(points, numbers, key=[f"{point.name}: {point.facts}" for point in points])


def _figure(
    points: Sequence[_Point], labels: Sequence[str], key: Sequence[str] = ()
) -> Figure | None:
    """The whole figure.

    Args:
        points: the engines.
        labels: what stands beside each point.
        key: what the labels stand for, one line each below the plot.

    Returns:
        the figure; None where the labels have not room enough and there is no key.
    """
    from matplotlib.figure import Figure

    height = 4.9 if any(not point.equal for point in points) else 2.4
    figure = Figure(figsize=(7.2, height + 0.21 * len(key)))
    spots = _draw(figure, points)
    _legend(figure, points)
    for row, line in enumerate(key, start=1):
        place_below(figure.axes[-1], row, f"{row:\N{FIGURE SPACE}>2}   {line}")
    fits = _label(figure, spots, labels)
    return figure if fits or key else None


def _point(result: EngineResult, is_baseline: bool) -> _Point | None:
    """What to draw for one engine; None where there is nothing to place it by."""
    accuracy, latency = result.accuracy, result.latency_ms
    if latency is None or latency.p50 <= 0 or (accuracy is None and not is_baseline):
        return None
    sqnr = math.inf if is_baseline or accuracy is None else accuracy.sqnr_db
    if math.isnan(sqnr) or sqnr == -math.inf:
        return None
    facts = [] if is_baseline else [format_sqnr(sqnr)]
    if accuracy is not None and accuracy.top1_agreement is not None and not is_baseline:
        facts.append(f"{format_percent(accuracy.top1_agreement)} same top-1")
    text = _BASELINE if is_baseline else ", ".join(facts)
    precision = result.precision.lower()
    kind = next((kind for kind in _STYLES if precision.startswith(kind)), "other")
    return _Point(elide(result.name, 46), latency, sqnr, text, kind)


def _draw(figure: Figure, points: Sequence[_Point]) -> list[_Spot]:
    """Draws the band and the plane, those that have points, and says where each point is."""
    equal = [point for point in points if point.equal]
    noisy = [point for point in points if not point.equal]
    parts = [part for part in (equal, noisy) if part]
    ratios = [1.0, 2.2] if len(parts) == 2 else [1.0]
    grid = figure.subplots(
        len(parts), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )
    spots = []
    for point in points:
        axes = grid[0, 0] if point.equal else grid[-1, 0]
        spots.append(_Spot(axes, point, 0.5 if point.equal else point.sqnr_db))
        _draw_point(spots[-1])
    if equal:
        _dress_band(grid[0, 0])
    if noisy:
        _dress_plane(grid[-1, 0], [point.sqnr_db for point in noisy])
    _dress_latency(grid[-1, 0], [point.latency for point in points])
    if len(parts) == 2:
        figure.set_layout_engine("constrained", h_pad=0.03, w_pad=0.09, hspace=0.0)
        _break_marks(grid[0, 0], grid[1, 0])
    return spots


def _legend(figure: Figure, points: Sequence[_Point]) -> None:
    """Which marker is which precision, above the plot."""
    from matplotlib.lines import Line2D

    found = {point.kind: point.style for point in points}
    kinds = {kind: found[kind] for kind in (*_STYLES, "other") if kind in found}
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            linestyle="none",
            markersize=7,
            label=precision_title(kind),
        )
        for kind, (colour, marker) in kinds.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)


def _draw_point(spot: _Spot) -> None:
    """The median as a marker, p20 to p80 as a line."""
    colour, marker = spot.point.style
    axes, latency, height = spot.axes, spot.point.latency, spot.height
    axes.plot([latency.p20, latency.p80], [height, height], color=colour, linewidth=1.6)
    axes.plot(latency.p50, height, marker=marker, color=colour, markersize=8, markeredgecolor="w")


def _dress_band(axes: Axes) -> None:
    """The band at the top has no scale of its own."""
    axes.set_ylim(0, 1)
    axes.set_yticks([0.5])
    axes.set_yticklabels([f"equal\nto float\n(> {EQUAL_DB:.0f} dB)"])
    axes.tick_params(axis="y", length=0)
    axes.set_facecolor("#f3f5f7")
    axes.tick_params(axis="x", which="both", length=0)


def _dress_plane(axes: Axes, values: Sequence[float]) -> None:
    """Room above and below the points for their labels."""
    low, high = min(values), max(values)
    margin = max(0.22 * (high - low), 3.0)
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("SQNR (dB), higher is closer to float")


def _dress_latency(axes: Axes, latencies: Sequence[LatencyMs]) -> None:
    """A logarithmic axis where the latencies are far apart; plain numbers either way."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(i.p20 for i in latencies), max(i.p80 for i in latencies)
    if low > 0 and high / low > 4:
        axes.set_xscale("log")
        reach = (high / low) ** 0.12
        axes.set_xlim(low / reach, high * reach)
        steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        reach = max(0.2 * (high - low), 0.1 * high)
        axes.set_xlim(max(low - reach, 0.0), high + reach)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.set_xlabel("latency of one call (ms): median, and p20 to p80 as a line; left is faster")


def _break_marks(upper: Axes, lower: Axes) -> None:
    """Two slanted strokes on the left edge say that the scale is interrupted."""
    stroke: dict[str, Any] = {
        "marker": [(-1, -0.6), (1, 0.6)],
        "markersize": 9,
        "linestyle": "none",
        "color": INK,
        "clip_on": False,
    }
    upper.plot([0], [0], transform=upper.transAxes, **stroke)
    lower.plot([0], [1], transform=lower.transAxes, **stroke)
    upper.spines["bottom"].set_visible(False)


def _label(figure: Figure, spots: Sequence[_Spot], labels: Sequence[str]) -> bool:
    """Writes the labels, with a thin line to those that are not next door.

    Returns:
        whether all of them are free of each other, of the points and of the frame.
    """
    figure.draw_without_rendering()  # from here on the layout is final, and so are positions
    figure.set_layout_engine("none")
    unit = figure.dpi / 72
    points, sizes, frames, texts = [], [], [], []
    for spot, label in zip(spots, labels, strict=True):
        text = spot.axes.text(0, 0, label, va="bottom", linespacing=1.25)
        size, frame = text.get_window_extent(), spot.axes.get_window_extent()
        texts.append(text)
        points.append(spot.pixels(spot.point.latency.p50))
        sizes.append((size.width + 4 * unit, size.height + 2 * unit))
        frames.append(Box(frame.x0, frame.y0, frame.x1, frame.y1))
    boxes, fits = place(points, sizes, frames, [spot.box(5 * unit) for spot in spots], unit)
    to_figure = figure.transFigure.inverted()
    for spot, text, point, box in zip(spots, texts, points, boxes, strict=True):
        # Fractions of the figure: pixels would depend on the resolution of the file.
        x, y = to_figure.transform((box.left + 2 * unit, box.bottom + unit))
        text.set_transform(figure.transFigure)
        text.set_position((float(x), float(y)))
        _leader(spot.axes, point, box, unit)
    return fits


def _leader(axes: Axes, spot: tuple[float, float], box: Box, unit: float) -> None:
    """A thin line from a point to its label, where the label is not next to it."""
    x = min(max(spot[0], box.left), box.right)
    y = min(max(spot[1], box.bottom), box.top)
    if math.hypot(x - spot[0], y - spot[1]) < 13 * unit:
        return
    to_data = axes.transData.inverted()
    (x0, y0), (x1, y1) = to_data.transform(spot), to_data.transform((x, y))
    axes.plot([x0, x1], [y0, y1], color=GREY, linewidth=0.8, zorder=1, scalex=False, scaley=False)
