"""A report as a JSON file that programs read."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from octavo.core.errors import InputError
from octavo.core.files import atomic_write
from octavo.core.results import Accuracy, Report, to_json

__all__ = ["SCHEMA_VERSION", "write_json"]

SCHEMA_VERSION = 1
"""Raised when a field is renamed, removed or changes its meaning; new fields leave it as it is."""


def write_json(report: Report, path: str | os.PathLike[str]) -> Path:
    """Writes a report as JSON, in one step.

    The keys are `schema_version` and then the fields of `Report`, in the order in which the class
    declares them, so that two files compare line by line. The measures of accuracy stand beside an
    engine's other figures. An infinite number (the SQNR of an output that equals the float
    model's) is "inf", an undefined one null.

    Args:
        report: what was measured.
        path: where the file goes; an older file there is replaced.

    Returns:
        `path`.

    Raises:
        InputError: the report holds a value that JSON has no form for.
    """
    content = {"schema_version": SCHEMA_VERSION, **to_json(report)}
    for row in (content["baseline"], *content["engines"]):
        _flatten(row)
    text = json.dumps(content, indent=2, allow_nan=False, default=_refuse)
    return atomic_write(path, text + "\n")


def _flatten(row: dict[str, Any]) -> None:
    """Puts the measures of accuracy where `accuracy` was; null where none was measured."""
    measures = row.pop("accuracy") or dict.fromkeys(field.name for field in fields(Accuracy))
    row.update(measures)


def _refuse(value: Any) -> NoReturn:
    """Says which value `json` could not write."""
    message = (
        f"The report holds {value!r} of type {type(value).__name__}, which JSON has no form for; "
        "turn it into a Python number or text before making the report."
    )
    raise InputError(message)
