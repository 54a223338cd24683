"""Which implementation of an operator runs: selection, measurement, and a cache of results."""
