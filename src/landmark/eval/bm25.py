"""BM25 over whole documents by the package bm25s, beside ranking by landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Bm25:
    """An index of documents for BM25, with the settings of bm25s.

    These are Lucene's variant, lower case, English stop words left out.

    Args:
        texts: the documents.

    Raises:
        ModuleNotFoundError: bm25s is missing.
        ValueError: no document holds a word.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._bm25s = require_bm25s()
        words = self._words(texts)
        if not any(words):
            raise ValueError(
                f"BM25: expected documents with words, got {len(texts)} without; pass documents "
                "that hold text"
            )
        self._index = self._bm25s.BM25()
        self._index.index(words, show_progress=False)
        self._documents = len(texts)

    def scores(self, query: str) -> list[float]:
        """Returns the score of every document, 0 where it shares no word with the query."""
        (words,) = self._words([query])
        return self._index.get_scores(words).tolist() if words else [0.0] * self._documents

    def settings(self) -> dict[str, Any]:
        """Returns all settings as JSON types."""
        index = self._index
        chosen = {"method": index.method, "k1": index.k1, "b": index.b, "stopwords": "english"}
        return {**chosen, "bm25s": self._bm25s.__version__}

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        found: list[list[str]] = self._bm25s.tokenize(
            list(texts), stopwords="en", return_ids=False, show_progress=False
        )
        return found


def require_bm25s() -> Any:
    """Returns the package bm25s.

    Raises:
        ModuleNotFoundError: it is missing.
    """
    try:
        import bm25s
    except ImportError:
        raise ModuleNotFoundError(
            "BM25: expected the package bm25s, which is not installed: pip install "
            "'landmark-attention[rank]'"
        ) from None
    return bm25s
