"""The figures of a report as PNG files, and as SVG text for the HTML file.

The same report gives the same bytes: no dates, fixed identifiers, the fonts that come with
matplotlib, and none of the user's own matplotlib settings.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.core.files import atomic_write
from octavo.core.results import Report
from octavo.reports._extras import require
from octavo.reports.figures import GREY, INK, histograms, layer_sqnr, trials
from octavo.reports.scatter import accuracy_latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PLOTS", "Plot", "render", "write_plots"]

_DPI = 144

_SETTINGS: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.dpi": _DPI,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 9,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.7,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "octavo",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Plot:
    """One kind of figure.

    Attributes:
        name: the stem of its file.
        title: what it shows.
        alt: what to say to a reader who does not see it.
        draw: makes the figure; None where the report has nothing to draw.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[Report], Figure | None]


PLOTS = (
    Plot(
        "accuracy_latency",
        "Accuracy against latency",
        "Every engine as a point: SQNR in dB over the median latency in milliseconds. The results "
        "table holds the same numbers.",
        accuracy_latency,
    ),
    Plot(
        "layer_sqnr",
        "Noise layer by layer",
        "SQNR of every layer's output in execution order; the layers of lowest SQNR are named.",
        layer_sqnr,
    ),
    Plot(
        "histograms",
        "Distributions and the ranges that were chosen",
        "Histograms of a few tensors with logarithmic counts; lines mark the range that INT8 "
        "covers.",
        histograms,
    ),
    Plot(
        "trials",
        "Candidates of the calibration",
        "SQNR of every candidate as a bar; the table beside it holds the same numbers.",
        trials,
    ),
)


def write_plots(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes the figures of a report as PNG files, 1037 pixels wide.

    Args:
        report: what was measured.
        folder: where the files go; it is created where it is missing.

    Returns:
        the files written: `accuracy_latency.png`, `layer_sqnr.png`, `histograms.png` and
        `trials.png`, each where the report has something to draw in it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    written = []
    for plot in PLOTS:
        data = render(plot, report, "png")
        if data is not None:
            written.append(atomic_write(Path(folder) / f"{plot.name}.png", data))
    return written


def render(plot: Plot, report: Report, kind: str) -> bytes | None:
    """Draws one figure.

    Args:
        plot: which figure.
        report: what was measured.
        kind: "png" or "svg".

    Returns:
        the content of the file; None where the report has nothing to draw.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "Drawing plots")
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with _settings():
        figure = plot.draw(report)
        if figure is None:
            return None
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, metadata=metadata)
        return stream.getvalue()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Puts our settings in force, on matplotlib's defaults, and restores the user's afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield
