"""Training: from a configuration and shards to checkpoints and metrics."""
