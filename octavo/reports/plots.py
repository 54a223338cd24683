"""The figures of a report as PNG files, and as SVG text for the HTML file.

The same report gives the same bytes: no dates, fixed identifiers, the fonts that come with
matplotlib, and none of the user's own matplotlib settings.
"""

from __future__ import annotations

import importlib
import io
import os
from pathlib import Path
from typing import Any

from octavo.core.errors import MissingDependencyError
from octavo.core.files import atomic_write
from octavo.core.results import Report
from octavo.reports.figures import GREY, INK, accuracy_latency, histograms, layer_sqnr, trials

__all__ = ["PLOTS", "SETTINGS", "render", "require", "write_plots"]

PLOTS = {draw.__name__: draw for draw in (accuracy_latency, layer_sqnr, histograms, trials)}
"""Stem of the file -> what draws it."""

SETTINGS: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.dpi": 144,
    "font.size": 9,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.7,
    "svg.hashsalt": "octavo",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def write_plots(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes the figures of a report as PNG files, 1036 pixels wide.

    Args:
        report: what was measured.
        folder: where the files go; it is created where it is missing.

    Returns:
        the files written: `accuracy_latency.png`, `layer_sqnr.png`, `histograms.png` and
        `trials.png`, each where the report has something to draw in it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    drawn = {name: render(name, report, "png") for name in PLOTS}
    paths = {Path(folder) / f"{name}.png": data for name, data in drawn.items() if data}
    return [atomic_write(path, data) for path, data in paths.items()]


def render(name: str, report: Report, kind: str) -> bytes | None:
    """Draws one figure.

    Args:
        name: of the figure, as in `PLOTS`.
        report: what was measured.
        kind: "png" or "svg".

    Returns:
        the content of the file; None where the report has nothing to draw.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "Drawing plots")
    from matplotlib import style

    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with style.context(SETTINGS, after_reset=True):
        figure = PLOTS[name](report)
        if figure is None:
            return None
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, metadata=metadata)
        return stream.getvalue()


def require(package: str, purpose: str) -> None:
    """Imports a package of the extra `report`, or says how to install it.

    Args:
        package: the name to import.
        purpose: what needs it, as the subject of the message ("An HTML report").

    Raises:
        MissingDependencyError: the package cannot be imported.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the package '{package}', which cannot be imported ({error}). "
            'Install it with: pip install "octavo[report]"'
        ) from error
