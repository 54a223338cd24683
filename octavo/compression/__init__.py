"""What changes a model so that it gets smaller or faster."""
