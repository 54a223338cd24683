"""Operators with more than one implementation: an exact reference in torch, and Triton kernels.

A folder an operator; each holds schema.py (the public function and all validation), reference.py
and triton.py, which take the same arguments.
"""

from octavo.kernels.dispatch import explain
from octavo.kernels.dynamic_quantize.schema import dynamic_quantize
from octavo.kernels.int8_gemm.schema import int8_gemm

__all__ = ["dynamic_quantize", "explain", "int8_gemm"]
