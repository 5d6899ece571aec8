"""Evaluation: pass key, named facts and perplexity as typed results, their pictures, and the
demo.
"""
