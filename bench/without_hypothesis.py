"""A pytest plugin for machines without hypothesis: its tests are skipped, the others still run."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest


class _Anything:
    """Stands for every strategy: attributes and calls give it again."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):  # a module that is asked where its file is must have none
            raise AttributeError(name)
        return self

    def __call__(self, *_arguments: Any, **_options: Any) -> _Anything:
        return self

    def __or__(self, _other: object) -> _Anything:
        return self


def _given(*_arguments: Any, **_options: Any) -> Callable[[Any], Any]:
    def mark(_test: Any) -> Any:
        @pytest.mark.skip(reason="hypothesis is not installed")
        def skipped() -> None:
            raise AssertionError("a test that is skipped ran")

        return skipped

    return mark


def _settings(*_arguments: Any, **_options: Any) -> Callable[[Any], Any]:
    return lambda test: test


def install() -> None:
    """Puts a stand-in for hypothesis in its place, unless the real one is here."""
    if importlib.util.find_spec("hypothesis") is not None:
        return
    module = types.ModuleType("hypothesis")
    strategies: Any = types.ModuleType("hypothesis.strategies")
    anything = _Anything()
    strategies.__getattr__ = anything.__getattr__
    vars(module).update(
        given=_given,
        settings=_settings,
        strategies=strategies,
        assume=lambda _condition: True,
        example=_settings,
        note=print,
        HealthCheck=anything,
    )
    sys.modules.update({"hypothesis": module, "hypothesis.strategies": strategies})


install()
