"""Quantization of activations at run time."""
