"""A report as one HTML file that needs no network and no JavaScript.

Plots are embedded as SVG images. Every text is escaped by the template engine, and a content
security policy in the file forbids whatever is not part of it.
"""

from __future__ import annotations

import base64
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from octavo.core.files import atomic_write
from octavo.core.results import EngineResult, Report
from octavo.reports._extras import require
from octavo.reports.headline import headline
from octavo.reports.plots import PLOTS, render
from octavo.reports.summary import (
    NONE,
    backend_title,
    clean,
    engine_rows,
    format_percent,
    format_seconds,
    format_sqnr,
    precision_title,
)

__all__ = ["write_html"]

_ORDER = ("int4", "int8", "float8", "float16", "bfloat16", "float32", "float64")


def write_html(report: Report, path: str | os.PathLike[str]) -> Path:
    """Writes a report as one self-contained HTML file, in one step.

    The same report gives the same bytes.

    Args:
        report: what was measured; where an INT8 engine has a `layer_report`, it tells why layers
            are not INT8 and not only how many.
        path: where the file goes; an older file there is replaced.

    Returns:
        `path`.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    return atomic_write(path, _render(report))


def _render(report: Report) -> str:
    """Fills the template."""
    require("jinja2", "An HTML report")
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Applies to every value before it is escaped: control codes are not valid in HTML.
        finalize=_showable,
    )
    environment.filters.update(
        backend=backend_title,
        precision=precision_title,
        percent=format_percent,
        seconds=format_seconds,
        sqnr=format_sqnr,
    )
    source = files("octavo.reports").joinpath("template.html.j2").read_text(encoding="utf-8")
    rows = engine_rows(report)
    return environment.from_string(source).render(
        report=report,
        none=NONE,
        headline=headline(report),
        rows=rows,
        labelled=any(row.top1 != NONE for row in rows),
        precisions=_precisions(report),
        share=_int8_share,
        layers={
            engine.name: engine.layer_report
            for engine in report.engines
            if engine.layer_report is not None and engine.precision.startswith("int8")
        },
        plots=_plots(report),
    )


def _showable(value: Any) -> Any:
    """Text without control codes, line by line; markup and numbers as they are."""
    return "\n".join(map(clean, value.split("\n"))) if type(value) is str else value


def _plots(report: Report) -> dict[str, dict[str, str]]:
    """Title, alternative text and data URI of each plot that the report has data for."""
    found = {}
    for plot in PLOTS:
        data = render(plot, report, "svg")
        if data is not None:
            uri = f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"
            found[plot.name] = {"title": plot.title, "alt": plot.alt, "uri": uri}
    return found


def _precisions(report: Report) -> list[str]:
    """The precisions that layers of any engine run in, narrow ones first and reformats last."""
    found = {name for engine in report.engines for name in engine.layers}

    def rank(name: str) -> tuple[bool, int, str]:
        return name == "reformat", _ORDER.index(name) if name in _ORDER else len(_ORDER), name

    return sorted(found, key=rank)


def _int8_share(engine: EngineResult) -> Any:
    """The share of compute layers that run in INT8, as text."""
    total = sum(count for name, count in engine.layers.items() if name != "reformat")
    return format_percent(engine.layers.get("int8", 0) / total if total else None)
