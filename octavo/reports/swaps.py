"""What `octavo.quantize` or `octavo.convert_attention` did to a model, on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Console

from octavo.core.swaps import LayerSwap, SwapSummary
from octavo.reports._printer import Printer
from octavo.reports.summary import format_size

__all__ = ["print_swaps"]


def print_swaps(summary: SwapSummary, console: Console | None = None) -> None:
    """Prints one line for all layers that differ only by numbers in their names.

    Args:
        summary: what became of the layers.
        console: where to print; standard output when None.
    """
    out = Printer(console)
    total = len(summary.layers)
    after, before = format_size(summary.bytes_after), format_size(summary.bytes_before)
    sizes = f"the model takes {after}" + (f" instead of {before}" if after != before else "")
    out.line(f"{summary.swapped} of {total} {summary.headline}; {sizes}.", style="bold")
    out.line()
    table = out.table(
        [
            ("Layers", "name"),
            ("", "number"),
            ("Kind", "fixed"),
            ("Now", "fixed"),
            ("Size", "number"),
        ]
    )
    for layers in _groups(summary.layers):
        first = layers[0]
        name = _pattern(first.name) if len(layers) > 1 else first.name or "(the model)"
        size = _size(layers)
        became = first.became.replace(", ", "\n") or "as before"
        cells = [f"{name}\n{_details(layers)}", f"{len(layers)}", first.kind, became, size]
        out.row(table, cells, style="" if first.became else "dim")
    out.show(table)
    if summary.note:
        out.line()
        out.line(summary.note)


def _groups(layers: Sequence[LayerSwap]) -> Iterable[list[LayerSwap]]:
    groups: dict[tuple[str, ...], list[LayerSwap]] = {}
    for layer in layers:
        why = "" if layer.became else layer.detail
        key = (_pattern(layer.name), layer.kind, layer.became, why)
        groups.setdefault(key, []).append(layer)
    return groups.values()


def _size(layers: Sequence[LayerSwap]) -> str:
    before = format_size(sum(layer.bytes_before for layer in layers))
    after = format_size(sum(layer.bytes_after for layer in layers))
    return after if before == after else f"{after}\nwas {before}"


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _details(layers: Sequence[LayerSwap]) -> str:
    details = list(dict.fromkeys(layer.detail for layer in layers))
    text = ", ".join(details[:4]) + (", ..." if len(details) > 4 else "")
    known = [layer.sqnr_db for layer in layers if layer.sqnr_db is not None]
    if known:
        low, high = f"{min(known):.1f}", f"{max(known):.1f}"
        text += f"; {low} dB" if low == high else f"; {low} to {high} dB"
    return text
