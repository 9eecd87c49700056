"""Trained networks at work: load, predict, export."""
