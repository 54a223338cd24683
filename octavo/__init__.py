"""Octavo folds a PyTorch model into eight bits, makes it fast, and proves what that cost."""

__version__ = "0.1.0"
