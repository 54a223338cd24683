"""Float activations times packed integer weights."""
