"""Depthwise and pointwise convolution in one kernel, with nothing between them in memory."""
