"""Batch policies against each other, by time to a common target."""
