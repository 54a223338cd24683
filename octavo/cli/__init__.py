"""The command line: it parses, calls the Python API and prints."""

from octavo.cli.app import app, main

__all__ = ["app", "main"]
