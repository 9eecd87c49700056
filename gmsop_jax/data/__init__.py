"""Data: foreign data sets → verified ArrayRecord shards → batches. Imports no JAX."""
