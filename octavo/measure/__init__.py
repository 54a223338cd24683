"""Measuring: latency of callables in turn, in medians and percentiles."""

from octavo.measure.timing import interleaved_latency

__all__ = ["interleaved_latency"]
