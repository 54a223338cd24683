"""Every error Octavo raises on purpose.

A message names the offending value and says what to do about it; the command line prints it as
one paragraph.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BuildError",
    "CalibrationError",
    "ExportError",
    "InputError",
    "MissingDependencyError",
    "OctavoError",
    "OctavoWarning",
    "UnsupportedError",
    "first_line",
]


class OctavoError(Exception):
    """Base of every error Octavo raises on purpose."""


class InputError(OctavoError, ValueError):
    """An argument or a batch of data has a wrong name, shape, dtype or value."""


class CalibrationError(OctavoError):
    """Calibration cannot give a table that can be trusted."""


class ArtifactError(OctavoError):
    """A file (table, engine, manifest, model) is corrupted, truncated, foreign or stale."""


class ExportError(OctavoError):
    """A model cannot be expressed as the ONNX graph that was asked for."""


class BuildError(OctavoError):
    """A backend could not build the engine, or built something other than what was asked for."""


class UnsupportedError(OctavoError):
    """This backend, device or precision cannot do what was asked for, and the message says why."""


class MissingDependencyError(OctavoError, ImportError):
    """An optional package is not installed; the message gives the command that installs it."""


class OctavoWarning(UserWarning):
    """Something that the user should know, and that does not stop the work."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in short; its kind where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
