"""Octavo folds a PyTorch model into eight bits, makes it fast, and proves what that cost.

The public names below are loaded when they are first used, so that importing octavo costs nothing
beyond importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from octavo.core.version import __version__

if TYPE_CHECKING:
    from octavo.calibration.data import load_data, random_batches
    from octavo.calibration.table import CalibrationTable
    from octavo.core.errors import OctavoError, OctavoWarning
    from octavo.engines.backend import Profile
    from octavo.engines.engine import Engine
    from octavo.pipelines.build import build, load
    from octavo.pipelines.calibrate import calibrate
    from octavo.pipelines.compare import compare

__all__ = [
    "CalibrationTable",
    "Engine",
    "OctavoError",
    "OctavoWarning",
    "Profile",
    "__version__",
    "build",
    "calibrate",
    "compare",
    "load",
    "load_data",
    "random_batches",
]

_HOME = {
    "CalibrationTable": "octavo.calibration.table",
    "Engine": "octavo.engines.engine",
    "OctavoError": "octavo.core.errors",
    "OctavoWarning": "octavo.core.errors",
    "Profile": "octavo.engines.backend",
    "build": "octavo.pipelines.build",
    "calibrate": "octavo.pipelines.calibrate",
    "compare": "octavo.pipelines.compare",
    "load": "octavo.pipelines.build",
    "load_data": "octavo.calibration.data",
    "random_batches": "octavo.calibration.data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
