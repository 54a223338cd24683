"""The C of CPUs: compiling it, loading it, and memory for its results."""
