"""What `octavo.fuse` did to a model, on a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from rich.console import Console

from octavo.core.fusions import FuseSummary
from octavo.reports._printer import Printer

__all__ = ["print_fusions"]

Entry = TypeVar("Entry")
MOST_NAMES = 4


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


def _grouped(entries: Iterable[Entry], key: Callable[[Entry], str]) -> Iterable[list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups.values()


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "*", text)


def _general(reason: str) -> str:
    """A reason without the numbers in the names that it quotes."""
    return re.sub(r"'[^']*'", lambda quoted: _without_numbers(quoted[0]), reason)


def _names(names: Iterable[str]) -> str:
    """Names, those that differ only by numbers once."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_without_numbers(name), []).append(name)
    shown = [pattern if len(group) > 1 else group[0] for pattern, group in alike.items()]
    return ", ".join(shown[:MOST_NAMES]) + (", ..." if len(shown) > MOST_NAMES else "")
