"""Modules that compute in eight bits or in linear time, and what puts them in a model."""

from octavo.layers.attention import MultiheadAttention
from octavo.layers.convert import AttentionPair, attention_pairs
from octavo.layers.efficient_attention import EfficientAttention, LinearAttention
from octavo.layers.linear import Int8Linear
from octavo.layers.recipes import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from octavo.layers.recurrent import Int8GRU, Int8LSTM
from octavo.layers.weight_only import WeightOnlyLinear

__all__ = [
    "AttentionPair",
    "EfficientAttention",
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8GRU",
    "Int8LSTM",
    "Int8Linear",
    "Int8Static",
    "Int8WeightOnly",
    "LinearAttention",
    "MultiheadAttention",
    "WeightOnlyLinear",
    "attention_pairs",
]
