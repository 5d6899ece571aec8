"""Texts, tokenizers, token files and the rows that a model is trained on."""
