"""Convolutions and what surrounds them, found in models and put into one layer each."""

from octavo.graph.fuse import fuse_model, merge_parallel

__all__ = ["fuse_model", "merge_parallel"]
