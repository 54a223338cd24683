"""The demo: a pretrained network, its data, and a run from the float model to the report."""
