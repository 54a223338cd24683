"""Modules that compute in eight bits or in linear time."""

from octavo.layers.attention.efficient import EfficientAttention, LinearAttention
from octavo.layers.attention.multihead import MultiheadAttention
from octavo.layers.convolution.fused import FusedConv2d, FusedSeparableConv2d
from octavo.layers.convolution.int8 import Int8Conv2d
from octavo.layers.convolution.separable import DepthwiseSeparableConv2d, MobileNetBlock
from octavo.layers.linear.int8 import Int8Linear
from octavo.layers.linear.weight_only import WeightOnlyLinear
from octavo.layers.recurrent.int8 import Int8GRU, Int8LSTM

__all__ = [
    "DepthwiseSeparableConv2d",
    "EfficientAttention",
    "FusedConv2d",
    "FusedSeparableConv2d",
    "Int8Conv2d",
    "Int8GRU",
    "Int8LSTM",
    "Int8Linear",
    "LinearAttention",
    "MobileNetBlock",
    "MultiheadAttention",
    "WeightOnlyLinear",
]
