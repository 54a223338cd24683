"""Text and tables on one console, whatever it can show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
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
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for value in values:
            grid.add_row(self.text("-"), self.text(value))
        self.console.print(grid)

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
        console = self.console
        least = [self._least_width(column) for column in table.columns]
        for column, width in zip(table.columns, least, strict=True):
            column.min_width = width
        needed = sum(least) + 2 * (len(least) - 1)
        if needed > console.width:
            table.width = needed
        console.print(table, soft_wrap=needed > console.width)

    def _least_width(self, column: Column) -> int:
        """Characters below which a column may not shrink: all of a number, some of a name."""
        options = self.console.options.update(width=_UNBOUNDED)
        cells = [column.header, *column.cells]
        widest = max(Measurement.get(self.console, options, cell).maximum for cell in cells)
        return widest if column.no_wrap else min(widest, _NAME_WIDTH)
