"""Conversion of data sets in other formats to ArrayRecord shards."""
