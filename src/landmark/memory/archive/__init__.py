"""A memory saved as a folder."""
