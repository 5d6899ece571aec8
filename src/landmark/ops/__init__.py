"""Landmark attention as one operation on given queries, keys and values."""
