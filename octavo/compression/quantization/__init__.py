"""Recipes, the registry of layer types, and what puts quantized layers into a model."""
