"""INT8 Linear from float rows to float rows."""
