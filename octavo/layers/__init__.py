"""Modules that compute in eight bits or in linear time, and what puts them in a model."""

from octavo.layers.attention import MultiheadAttention
from octavo.layers.conv import Int8Conv2d
from octavo.layers.convert import AttentionPair, attention_pairs
from octavo.layers.efficient_attention import EfficientAttention, LinearAttention
from octavo.layers.fused import FusedConv2d, FusedSeparableConv2d
from octavo.layers.linear import Int8Linear
from octavo.layers.recipes import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from octavo.layers.recurrent import Int8GRU, Int8LSTM
from octavo.layers.separable import DepthwiseSeparableConv2d, MobileNetBlock
from octavo.layers.weight_only import WeightOnlyLinear

__all__ = [
    "AttentionPair",
    "DepthwiseSeparableConv2d",
    "EfficientAttention",
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
    "LinearAttention",
    "MobileNetBlock",
    "MultiheadAttention",
    "WeightOnlyLinear",
    "attention_pairs",
]
