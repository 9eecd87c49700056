"""Conversion of foreign data sets to ArrayRecord shards."""
