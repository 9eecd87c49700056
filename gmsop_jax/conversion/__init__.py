"""Foreign data sets to ArrayRecord shards."""
