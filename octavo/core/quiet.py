"""Keeps other libraries from logging what an error or a summary of ours says too."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Drops what some loggers say, in this thread only and until the block ends.

    Their levels and handlers, other loggers and other threads are not touched.

    Args:
        *names: of the loggers themselves; those below them go on.
    """
    here = threading.get_ident()

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(from_elsewhere)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(from_elsewhere)
