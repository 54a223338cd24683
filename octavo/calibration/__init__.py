"""Calibration: from batches of real data to the scales of a quantized model."""

from octavo.calibration.calibrate import CalibrationOptions, calibrate_graph
from octavo.calibration.collect import OnnxCollector, TorchCollector
from octavo.calibration.entries import TensorEntry
from octavo.calibration.observers import (
    MSE,
    OBSERVERS,
    Entropy,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
)
from octavo.calibration.statistics import TensorStatistics
from octavo.calibration.table import CalibrationTable

__all__ = [
    "MSE",
    "OBSERVERS",
    "CalibrationOptions",
    "CalibrationTable",
    "Entropy",
    "MinMax",
    "MovingAverage",
    "Observer",
    "OnnxCollector",
    "Percentile",
    "TensorEntry",
    "TensorStatistics",
    "TorchCollector",
    "calibrate_graph",
]
