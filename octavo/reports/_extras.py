"""The optional packages of the extra `report`, and the error that names it."""

from __future__ import annotations

import importlib

from octavo.core.errors import MissingDependencyError

__all__ = ["require"]


def require(package: str, purpose: str) -> None:
    """Imports `package` or raises the error that says how to install it.

    Args:
        package: the name to import.
        purpose: what needs it, as the subject of the message ("An HTML report").

    Raises:
        MissingDependencyError: the package cannot be imported.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        message = (
            f"{purpose} needs the package '{package}', which cannot be imported ({error}). "
            'Install it with: pip install "octavo[report]"'
        )
        raise MissingDependencyError(message) from error
