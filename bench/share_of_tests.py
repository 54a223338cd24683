"""A pytest plugin: of all tests every so-and-so-many-th, so that several processes share them.

`OCTAVO_SHARE=1/8` keeps the second of every eight tests.
"""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests of the other processes."""
    number, count = map(int, os.environ.get("OCTAVO_SHARE", "0/1").split("/"))
    others = [item for place, item in enumerate(items) if place % count != number]
    if others:
        items[:] = items[number::count]
        config.hook.pytest_deselected(items=others)
