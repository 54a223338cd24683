"""INT8 convolution with its scales, bias, activation and residual in one kernel."""
