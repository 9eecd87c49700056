"""Weights of other implementations: reading, writing and the names between."""
