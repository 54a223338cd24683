"""The verbs of the public API: calibrate, build, load, compare."""
