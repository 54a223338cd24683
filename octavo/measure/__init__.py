"""Measuring: latency of models in turn, in medians and percentiles."""

from octavo.measure.isolated import isolated_latency
from octavo.measure.timing import interleaved_latency

__all__ = ["interleaved_latency", "isolated_latency"]
