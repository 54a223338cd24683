"""Text and tables on one console, whatever it can show."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from octavo.reports.summary import clean

__all__ = ["Printer"]

_ASCII = str.maketrans({"×": "x", "–": "-", "−": "-", "…": "...", "∞": "inf", "\ufffd": "?"})
_NAME_WIDTH = 14
_UNBOUNDED = 10_000


class Printer:
    """Puts text and tables on one console.

    Attributes:
        console: where to print; None stands for standard output.
    """

    def __init__(self, console: Console | None) -> None:
        self.console = console or Console()

    def text(self, value: str, style: str = "") -> Text:
        """One text as the stream can show it; line breaks stay."""
        value = "\n".join(clean(line) for line in value.split("\n"))
        if self.console.options.ascii_only:
            value = value.translate(_ASCII)
            value = value.encode(self.console.encoding, "replace").decode(self.console.encoding)
        return Text(value, style=style)

    def line(self, value: str = "", style: str = "") -> None:
        """Prints a paragraph, wrapped between words."""
        self.console.print(self.text(value, style))

    def verbatim(self, value: str) -> None:
        """Prints one line that a reader copies: the terminal may wrap it, this does not."""
        self.console.print(self.text(value), soft_wrap=True)

    def items(self, values: Sequence[str]) -> None:
        """Prints one paragraph an item, with a hanging dash."""
        wrapper = textwrap.TextWrapper(
            self.console.width, subsequent_indent="  ", break_on_hyphens=False
        )
        for value in values:
            self.line(wrapper.fill(f"- {value}"))

    def table(self, columns: Sequence[tuple[str, str]]) -> Table:
        """An empty table; a column is a heading and "name" (may fold), "number" or "fixed"."""
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            header_style="bold",
        )
        for heading, kind in columns:
            table.add_column(
                self.text(heading),
                justify="right" if kind == "number" else "left",
                no_wrap=kind != "name",
                overflow="fold",
                vertical="top",
            )
        return table

    def row(self, table: Table, cells: Iterable[str], style: str = "") -> None:
        """Adds one line of cells; what follows a cell's first line break is dim."""
        texts = []
        for cell in cells:
            first, _, rest = cell.partition("\n")
            texts.append(self.text(first))
            if rest:
                texts[-1].append("\n").append_text(self.text(rest, "dim"))
        table.add_row(*texts, style=style)

    def show(self, table: Table) -> None:
        """Prints the table, wider than the terminal if its numbers need that."""
        options = self.console.options.update(width=_UNBOUNDED)
        needed = -2
        for column in table.columns:
            cells = [column.header, *column.cells]
            widest = max(Measurement.get(self.console, options, cell).maximum for cell in cells)
            # All of a number has to show, and some of a name.
            column.min_width = widest if column.no_wrap else min(widest, _NAME_WIDTH)
            needed += column.min_width + 2
        if needed > self.console.width:
            table.width = needed
        self.console.print(table, soft_wrap=needed > self.console.width)
