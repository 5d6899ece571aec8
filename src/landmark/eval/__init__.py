"""Measuring: pass key, named facts, perplexity, ranking, indexes, and the demo."""
