"""Depthwise convolution of float values or int8 codes, with what follows it, in one kernel."""
