"""A report on a terminal: tables that fit 80 columns and stay whole when they are piped.

Numbers never wrap, and names do; what each function prints is in its docstring.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from octavo.core.results import Comparison, LayerReport, Report, Trial
from octavo.reports._printer import Printer
from octavo.reports.headline import headline
from octavo.reports.summary import (
    NONE,
    Row,
    all_notes,
    backend_title,
    engine_rows,
    format_layers,
    format_percent,
    format_ratio,
    format_seconds,
    format_size,
    format_spread,
    format_sqnr,
    precision_title,
    significant,
    speed_up,
)

__all__ = ["print_comparison", "print_layers", "print_report", "print_trials"]


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints the results: one entry per engine, then the headline and the notes.

    Args:
        report: what was measured.
        console: where to print; standard output when None.
    """
    out = Printer(console)
    out.line(report.title, style="bold")
    facts = [f"{key}: {value}" for key, value in report.data.items()]
    if facts:
        out.line("; ".join(facts), style="dim")
    out.line()
    out.show(_results(out, engine_rows(report)))
    out.line()
    out.line(
        "Size and speed-up: against the PyTorch baseline. Latency: median, and 20th to 80th "
        "percentile. SQNR and equal top-1 predictions: against the baseline's output.",
        style="dim",
    )
    out.line()
    out.line(headline(report))
    notes = all_notes(report)
    if notes:
        out.line()
        out.items(notes)
    if report.command:
        out.line()
        out.line("Made with:", style="dim")
        out.verbatim(report.command)


def _results(out: Printer, rows: Sequence[Row]) -> Table:
    """The results table; a cell holds a number and, below it, what qualifies it."""
    labelled = any(row.top1 != NONE for row in rows)
    layered = any(row.result.layers for row in rows)
    columns = [("Engine\n", "name"), *_numbers("Size\nratio", "Latency\np20–p80")]
    columns += _numbers("Speed-\nup", "SQNR\nsame top-1")
    columns += _numbers("Top-1\nacc.") if labelled else []
    columns += [("Layers\n", "fixed")] if layered else []
    table = out.table(columns)
    for index, row in enumerate(rows):
        if index:
            table.add_row()
        result = row.result
        kind = f"{backend_title(result.backend)}, {precision_title(result.precision)}"
        cells = [f"{result.name}\n{kind}", f"{row.size}\n{row.size_ratio}"]
        cells += [f"{row.latency}\n{row.spread}", row.speed_up]
        same = row.sqnr == row.agreement
        cells += [row.sqnr if same else f"{row.sqnr}\n{row.agreement}"]
        cells += [row.top1] if labelled else []
        cells += ["\n".join(format_layers(result.layers)) or NONE] if layered else []
        out.row(table, cells)
    return table


def _numbers(*headings: str) -> list[tuple[str, str]]:
    """Columns of numbers, for `Printer.table`."""
    return [(heading, "number") for heading in headings]


def print_trials(trials: Sequence[Trial], console: Console | None = None) -> None:
    """Prints the candidates that calibration compared, the chosen one marked.

    Args:
        trials: the candidates, in the order in which they are shown.
        console: where to print; standard output when None.
    """
    out = Printer(console)
    if not trials:
        out.line("Calibration compared no candidates.")
        return
    columns = [("Calibration", "name"), *_numbers("SQNR", "Same top-1", "Time"), ("", "fixed")]
    table = out.table(columns)
    for trial in trials:
        out.row(
            table,
            [
                trial.name,
                format_sqnr(trial.sqnr_db),
                format_percent(trial.top1_agreement),
                format_seconds(trial.seconds),
                "chosen" if trial.chosen else "",
            ],
            style="bold" if trial.chosen else "",
        )
    out.show(table)


def print_layers(
    layer_report: LayerReport, limit: int | None = None, console: Console | None = None
) -> None:
    """Prints what ran in which precision, and why not in INT8.

    Args:
        layer_report: the layers as the backend reports them, in execution order.
        limit: most layers to list. Those that say why they are not INT8 come first, and the rest
            is summed up in one line; None lists all.
        console: where to print; standard output when None.
    """
    out = Printer(console)
    layers = layer_report.layers
    if not layers:
        out.line("The engine reports no layers.")
        return
    order = sorted(range(len(layers)), key=lambda i: not layers[i].reason)
    shown = sorted(order if limit is None else order[: max(limit, 0)])
    out.line(", ".join(format_layers(layer_report.counts())), style="bold")
    explained = any(layers[i].reason for i in shown)
    columns = [("Layer", "name"), ("Operator", "name"), ("Runs in", "fixed")]
    table = out.table(columns + ([("Why not INT8", "name")] if explained else []))
    for index in shown:
        layer = layers[index]
        runs_in = layer.precision if layer.kind == "compute" else "reformat"
        cells = [layer.name, layer.op, runs_in] + ([layer.reason] if explained else [])
        out.row(table, cells, style="yellow" if layer.reason else "")
    if shown:
        out.line()
        out.show(table)
    rest = LayerReport(tuple(layers[i] for i in order if i not in shown))
    if rest.layers:
        kinds = ", ".join(format_layers(rest.counts()))
        out.line(f"… and {len(rest.layers)} more: {kinds}", style="dim")


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints two models or engines side by side.

    Args:
        comparison: what was measured; the first is the reference.
        console: where to print; standard output when None.
    """
    out = Printer(console)
    reference = comparison.latency_ms[0]
    columns = [("", "name"), *_numbers("Size", "Latency p50", "p20–p80", "Speed-up")]
    table = out.table(columns)
    rows = zip(comparison.names, comparison.size_bytes, comparison.latency_ms, strict=True)
    for name, size, latency in rows:
        out.row(
            table,
            [
                name,
                format_size(size),
                f"{significant(latency.p50)} ms",
                format_spread(latency),
                format_ratio(speed_up(reference, latency)),
            ],
        )
    out.show(table)
    out.line()
    out.line(f"{comparison.names[1]} against {comparison.names[0]}, {comparison.samples} samples:")
    out.items(_distance(comparison))


def _distance(comparison: Comparison) -> list[str]:
    """Every measure of the second model's accuracy, in words."""
    accuracy = comparison.accuracy
    facts = [f"SQNR {format_sqnr(accuracy.sqnr_db, equal='infinite (equal)')}"]
    facts += [f"largest difference {significant(accuracy.max_error)}"]
    facts += [f"cosine similarity {accuracy.cosine:.6f}"]
    if accuracy.top1_agreement is not None:
        facts.append(f"{format_percent(accuracy.top1_agreement)} of the predictions equal")
    if accuracy.top1_accuracy is not None:
        before = format_percent(comparison.reference_accuracy)
        facts.append(f"{format_percent(accuracy.top1_accuracy)} right, the reference {before}")
    return facts
