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
    from octavo.compression.quantization.checkpoint import load_quantized, save_quantized
    from octavo.compression.quantization.recipes import (
        Int4WeightOnly,
        Int8Dynamic,
        Int8Static,
        Int8WeightOnly,
    )
    from octavo.core.errors import OctavoError, OctavoWarning
    from octavo.engines.backend import Profile
    from octavo.engines.engine import Engine
    from octavo.graph.attention import AttentionPair, attention_pairs
    from octavo.pipelines.build import build, load
    from octavo.pipelines.calibrate import calibrate
    from octavo.pipelines.compare import compare
    from octavo.pipelines.convert import convert_attention
    from octavo.pipelines.fuse import fuse
    from octavo.pipelines.quantize import quantize

__all__ = [
    "AttentionPair",
    "CalibrationTable",
    "Engine",
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8Static",
    "Int8WeightOnly",
    "OctavoError",
    "OctavoWarning",
    "Profile",
    "__version__",
    "attention_pairs",
    "build",
    "calibrate",
    "compare",
    "convert_attention",
    "fuse",
    "load",
    "load_data",
    "load_quantized",
    "quantize",
    "random_batches",
    "save_quantized",
]

_HOME = {
    "AttentionPair": "octavo.graph.attention",
    "attention_pairs": "octavo.graph.attention",
    "CalibrationTable": "octavo.calibration.table",
    "Engine": "octavo.engines.engine",
    "Int4WeightOnly": "octavo.compression.quantization.recipes",
    "Int8Dynamic": "octavo.compression.quantization.recipes",
    "Int8Static": "octavo.compression.quantization.recipes",
    "Int8WeightOnly": "octavo.compression.quantization.recipes",
    "OctavoError": "octavo.core.errors",
    "OctavoWarning": "octavo.core.errors",
    "Profile": "octavo.engines.backend",
    "build": "octavo.pipelines.build",
    "calibrate": "octavo.pipelines.calibrate",
    "compare": "octavo.pipelines.compare",
    "fuse": "octavo.pipelines.fuse",
    "convert_attention": "octavo.pipelines.convert",
    "load": "octavo.pipelines.build",
    "load_data": "octavo.calibration.data",
    "load_quantized": "octavo.compression.quantization.checkpoint",
    "quantize": "octavo.pipelines.quantize",
    "random_batches": "octavo.calibration.data",
    "save_quantized": "octavo.compression.quantization.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
