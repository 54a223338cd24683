"""."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import nn

from octavo.core.errors import InputError

__all__ = ["Selector", "check_selectors", "selected"]


Selector: TypeAlias = "str | type[nn.Module] | Callable[[str, nn.Module], bool]"
"""A pattern of names ("encoder.*.query"), a type, or a function of name and module."""


def check_selectors(
    selectors: Sequence[Selector], layers: Sequence[tuple[str, nn.Module]], what: str
) -> None:
    """Sees to it that each selector matches something.

    Args:
        selectors: to check.
        layers: names and modules to choose from.
        what: they are, in the singular, for the message.

    Raises:
        InputError: one matches nothing, or is of another kind.
    """
    for given in selectors:
        if not any(_matches(given, name, module) for name, module in layers):
            raise InputError(
                f"{given!r} matches no {what}; {what.split()[0]}s are "
                f"{', '.join(name or '(the model)' for name, _ in layers[:8]) or 'none'}"
                f"{', ...' if len(layers) > 8 else ''}"
            )


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        return fnmatch.fnmatchcase(name, selector)
    if isinstance(selector, type):
        return isinstance(module, selector)
    if callable(selector):
        return bool(selector(name, module))
    raise InputError(
        f"{selector!r} selects no layers; give a pattern of names, a module type or a function of "
        "name and module"
    )


def selected(selectors: Sequence[Selector], name: str, module: nn.Module) -> bool:
    """Whether one of several selectors matches a layer."""
    return any(_matches(selector, name, module) for selector in selectors)
