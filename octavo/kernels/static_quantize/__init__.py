"""Quantization of activations with calibrated scales."""
