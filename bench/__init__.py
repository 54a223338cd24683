"""The project's evidence: peers measured in the same process, on the same data."""
