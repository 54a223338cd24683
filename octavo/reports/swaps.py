"""What `octavo.quantize` did to a model, on a terminal."""

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
    out.line(
        f"{summary.swapped} of {total} layers with weights are quantized; the model takes "
        f"{format_size(summary.bytes_after)} instead of {format_size(summary.bytes_before)}.",
        style="bold",
    )
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
        before, after = (
            sum(getattr(layer, field) for layer in layers)
            for field in ("bytes_before", "bytes_after")
        )
        name = _pattern(first.name) if len(layers) > 1 else first.name or "(the model)"
        size = format_size(after) + (f"\nwas {format_size(before)}" if first.became else "")
        became = first.became.replace(", ", "\n") or "as before"
        cells = [f"{name}\n{_details(layers)}", f"{len(layers)}", first.kind, became, size]
        out.row(table, cells, style="" if first.became else "dim")
    out.show(table)


def _groups(layers: Sequence[LayerSwap]) -> Iterable[list[LayerSwap]]:
    groups: dict[tuple[str, ...], list[LayerSwap]] = {}
    for layer in layers:
        why = "" if layer.became else layer.detail
        key = (_pattern(layer.name), layer.kind, layer.became, why)
        groups.setdefault(key, []).append(layer)
    return groups.values()


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
