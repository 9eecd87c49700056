"""Data: from verified ArrayRecord shards to batches. Imports no JAX."""
