"""Modules that compute in eight bits, and what puts them in the place of float ones."""
