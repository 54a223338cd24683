"""Recurrent modules."""
