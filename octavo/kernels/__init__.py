"""Operators with more than one implementation: an exact reference in torch, and Triton kernels.

A folder an operator; each holds schema.py (the public function and all validation), reference.py
and triton.py, which take the same arguments.
"""

from octavo.kernels.common.codes import fold_zero_point
from octavo.kernels.depthwise_conv2d.schema import depthwise_conv1d, depthwise_conv2d
from octavo.kernels.depthwise_separable_conv2d.schema import depthwise_separable_conv2d
from octavo.kernels.dispatch.select import explain, use_backend
from octavo.kernels.dynamic_quantize.schema import (
    LayerNorm,
    RmsNorm,
    add_dynamic_quantize,
    dynamic_quantize,
)
from octavo.kernels.int8_conv2d.schema import int8_conv2d
from octavo.kernels.int8_gemm.schema import int8_gemm
from octavo.kernels.linear_attention.schema import (
    State,
    linear_attention,
    linear_attention_step,
)
from octavo.kernels.static_quantize.schema import static_quantize
from octavo.kernels.weight_only_gemm.schema import weight_only_gemm

__all__ = [
    "LayerNorm",
    "RmsNorm",
    "State",
    "add_dynamic_quantize",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
    "dynamic_quantize",
    "explain",
    "fold_zero_point",
    "int8_conv2d",
    "int8_gemm",
    "linear_attention",
    "linear_attention_step",
    "static_quantize",
    "use_backend",
    "weight_only_gemm",
]
