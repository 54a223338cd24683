"""Linear modules."""
