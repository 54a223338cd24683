"""Progress bars, behind a protocol of one method so that every row can report without knowing how.

The default shows bars on a terminal and is silent elsewhere.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

__all__ = ["Advance", "NoProgress", "Progress", "TerminalProgress", "default_progress"]

Advance = Callable[[int], None]
"""Call it with the number of steps just finished."""


class Progress(Protocol):
    """Something that can show how far a task has come."""

    def task(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
        """Opens a task of `total` steps (None: not known) and yields the function that advances."""
        ...


class NoProgress:
    """Shows nothing."""

    @contextlib.contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Advance]:  # noqa: ARG002 - protocol
        """Yields a function that does nothing."""
        yield lambda _steps: None


class TerminalProgress:
    """Bars on standard error, drawn by rich; a finished bar stays with the time it took."""

    @contextlib.contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Advance]:
        """Draws one bar while the block runs."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        bar = Progress(
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        with bar:
            identity = bar.add_task(title, total=total)
            yield lambda steps: bar.advance(identity, steps)
            if total is None:
                bar.update(identity, total=bar.tasks[0].completed)


def default_progress() -> Progress:
    """Bars where standard error is a terminal, silence elsewhere."""
    return TerminalProgress() if sys.stderr.isatty() else NoProgress()
