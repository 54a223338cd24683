"""INT8 matrix product with its scales, bias, activation and residual in one kernel."""
