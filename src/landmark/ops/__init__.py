"""The operation: landmark attention over given queries, keys and values."""
