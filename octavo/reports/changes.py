"""What `quantize`, `convert_attention` or `fuse` did to the layers of a model, on a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from rich.console import Console

from octavo.core.fusions import FuseSummary
from octavo.core.swaps import LayerSwap, SwapSummary
from octavo.reports._printer import Printer
from octavo.reports.summary import format_size

__all__ = ["print_fusions", "print_swaps"]

Entry = TypeVar("Entry")


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
    columns = [("Layers", "name"), ("", "number"), ("Kind", "fixed"), ("Now", "fixed")]
    table = out.table([*columns, ("Size", "number")])
    for layers in _grouped(summary.layers, _likeness):
        first = layers[0]
        name = _names(layer.name for layer in layers) or "(the model)"
        became = first.became.replace(", ", "\n") or "as before"
        cells = [f"{name}\n{_details(layers)}", f"{len(layers)}", first.kind, became, _size(layers)]
        out.row(table, cells, style="" if first.became else "dim")
    out.show(table)
    if summary.note:
        out.line()
        out.line(summary.note)


def _likeness(layer: LayerSwap) -> tuple[str, ...]:
    """What layers on one line have in common."""
    why = "" if layer.became else layer.detail
    return _pattern(layer.name), layer.kind, layer.became, why


def _size(layers: Sequence[LayerSwap]) -> str:
    before = format_size(sum(layer.bytes_before for layer in layers))
    after = format_size(sum(layer.bytes_after for layer in layers))
    return after if before == after else f"{after}\nwas {before}"


def _details(layers: Sequence[LayerSwap]) -> str:
    text = _some(dict.fromkeys(layer.detail for layer in layers))
    known = [layer.sqnr_db for layer in layers if layer.sqnr_db is not None]
    if known:
        low, high = f"{min(known):.1f}", f"{max(known):.1f}"
        text += f"; {low} dB" if low == high else f"; {low} to {high} dB"
    return text


def print_fusions(summary: FuseSummary, console: Console | None = None) -> None:
    """Prints one line for all layers of a pattern, and one for all that stay for the same reason.

    Args:
        summary: what was found.
        console: where to print; standard output when None.
    """
    out = Printer(console)
    out.line(
        f"{summary.fused} of {summary.convolutions} convolutions are fused with what surrounds "
        f"them; depthwise-separable blocks: {summary.separable} of {summary.depthwise}.",
        style="bold",
    )
    for note in summary.notes:
        out.line(note)
    if summary.method == "nn.Sequential":
        out.line(
            "Only the order inside nn.Sequential is certain; give example_inputs for the rest."
        )
    elif summary.method == "recorded":
        out.line("The order of the layers is that of one run on the example inputs.")
    if summary.error is not None:
        out.line(f"On the example inputs the outputs differ by {summary.error:.1e} (relative).")
    if summary.fusions:
        out.line()
        table = out.table([("Now one layer", "name"), ("", "number")])
        for found in _grouped(summary.fusions, lambda one: one.pattern):
            names = _names(one.name for one in found)
            out.row(table, [f"{found[0].pattern}\n{names}", f"{len(found)}"])
        out.show(table)
    if summary.unfused:
        out.line()
        table = out.table([("Stays, and why", "name"), ("", "number"), ("Kind", "fixed")])
        for missed in _grouped(summary.unfused, lambda one: _general(one.reason)):
            reason = missed[0].reason if len(missed) == 1 else _general(missed[0].reason)
            names = _names(one.name for one in missed)
            out.row(table, [f"{names}\n{reason}", f"{len(missed)}", missed[0].kind])
        out.show(table)


def _general(reason: str) -> str:
    """A reason without the numbers in the names that it quotes."""
    return re.sub(r"'[^']*'", lambda quoted: _pattern(quoted[0]), reason)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _grouped(entries: Iterable[Entry], key: Callable[[Entry], Hashable]) -> list[list[Entry]]:
    groups: dict[Hashable, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def _names(names: Iterable[str]) -> str:
    """Names, those that differ only by numbers once."""
    groups = _grouped(names, _pattern)
    return _some(_pattern(group[0]) if len(group) > 1 else group[0] for group in groups)


def _some(texts: Iterable[str]) -> str:
    """The first four of the texts."""
    found = list(texts)
    return ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
