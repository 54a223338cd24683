"""Convolutions and what surrounds them, found in models and put into one layer each."""

from octavo.layers.fuse.fuse import fuse_model, merge_parallel

__all__ = ["fuse_model", "merge_parallel"]
