"""Octavo's version, kept where every row may read it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
