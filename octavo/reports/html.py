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
from octavo.reports.headline import headline
from octavo.reports.plots import PLOTS, render, require
from octavo.reports.summary import (
    NONE,
    all_notes,
    backend_title,
    bits,
    clean,
    engine_rows,
    format_percent,
    format_seconds,
    format_sqnr,
    int8_layers,
    precision_title,
)

__all__ = ["write_html"]


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
    page = environment.from_string(source).render(
        report=report,
        headline=headline(report),
        rows=rows,
        labelled=any(row.top1 != NONE for row in rows),
        precisions=_precisions(report),
        share=_int8_share,
        notes=all_notes(report),
        plots={
            name: base64.b64encode(svg).decode()
            for name in PLOTS
            if (svg := render(name, report, "svg"))
        },
    )
    return atomic_write(path, page)


def _showable(value: Any) -> Any:
    """Text without control codes, line by line; markup and numbers as they are."""
    return "\n".join(map(clean, value.split("\n"))) if type(value) is str else value


def _precisions(report: Report) -> list[str]:
    """The precisions that layers of any engine run in, narrow ones first and reformats last."""
    found = {name for engine in report.engines for name in engine.layers}
    return sorted(found, key=lambda name: (name == "reformat", bits(name), name))


def _int8_share(engine: EngineResult) -> str:
    """The share of compute layers that run in INT8, as text."""
    ran, total = int8_layers(engine)
    return format_percent(ran / total if total else None)
