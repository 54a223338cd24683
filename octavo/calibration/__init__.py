"""Calibration: from batches of real data to the scales of a quantized model."""
