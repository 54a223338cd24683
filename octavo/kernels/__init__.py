"""Operators with several implementations: an exact reference in torch, Triton kernels, C.

One folder per operator; each holds schema.py (the public function and all validation), reference.py
and triton.py or native.py, which take the same arguments.

A backend that is named runs a call or is refused. "auto" takes one that can run it: on a GPU it
measures those that can, once for each shape bucket, and keeps the fastest; elsewhere their order
decides. `explain` says who ran an operator last, and why the others did not.
"""

from octavo.kernels.add_norm.schema import add_norm
from octavo.kernels.attention.schema import attention
from octavo.kernels.common.codes import fold_zero_point
from octavo.kernels.depthwise_conv2d.schema import depthwise_conv1d, depthwise_conv2d
from octavo.kernels.depthwise_separable_conv2d.schema import depthwise_separable_conv2d
from octavo.kernels.dispatch.select import explain, use_backend
from octavo.kernels.dynamic_quantize.schema import dynamic_quantize
from octavo.kernels.int8_conv2d.schema import int8_conv2d
from octavo.kernels.int8_gemm.schema import int8_gemm
from octavo.kernels.int8_linear.schema import int8_linear
from octavo.kernels.linear_attention.schema import (
    State,
    linear_attention,
    linear_attention_step,
)
from octavo.kernels.static_quantize.schema import static_quantize
from octavo.kernels.weight_only_gemm.schema import weight_only_gemm

__all__ = [
    "State",
    "add_norm",
    "attention",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
    "dynamic_quantize",
    "explain",
    "fold_zero_point",
    "int8_conv2d",
    "int8_gemm",
    "int8_linear",
    "linear_attention",
    "linear_attention_step",
    "static_quantize",
    "use_backend",
    "weight_only_gemm",
]
