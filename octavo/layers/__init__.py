"""Modules that compute in eight bits, and what puts them in the place of float ones."""

from octavo.layers.attention import MultiheadAttention
from octavo.layers.conv import Int8Conv2d
from octavo.layers.fused import FusedConv2d, FusedSeparableConv2d
from octavo.layers.linear import Int8Linear
from octavo.layers.recipes import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from octavo.layers.recurrent import Int8GRU, Int8LSTM
from octavo.layers.separable import DepthwiseSeparableConv2d, MobileNetBlock
from octavo.layers.weight_only import WeightOnlyLinear

__all__ = [
    "DepthwiseSeparableConv2d",
    "FusedConv2d",
    "FusedSeparableConv2d",
    "Int4WeightOnly",
    "Int8Conv2d",
    "Int8Dynamic",
    "Int8GRU",
    "Int8LSTM",
    "Int8Linear",
    "Int8Static",
    "Int8WeightOnly",
    "MobileNetBlock",
    "MultiheadAttention",
    "WeightOnlyLinear",
]
