"""TensorRT 10 and 11 (`backend`) and TensorRT for RTX (`rtx`), built and run by the same code.

`api` is the one file that knows where the three differ. A build goes through `build`, `progress`
and `timing_cache`; a file is opened through `opening` and `plan`, and run by one of the two
runners; `layers` reads back what TensorRT made of it.
"""
