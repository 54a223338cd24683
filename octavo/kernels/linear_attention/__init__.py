"""Attention without softmax, whose time and memory grow with the length and not its square."""
