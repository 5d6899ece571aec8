"""Compare answers with right ones, as SQuAD's evaluation does."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

ARTICLES = re.compile(r"\b(a|an|the)\b")


class Score(NamedTuple):
    """How right one answer is: a right answer in it, nothing else, and the overlap of words."""

    contains: bool
    exact: bool
    f1: float


def score(answer: str, right: Sequence[str]) -> Score:
    """Compares an answer with right ones; the best counts.

    Words are compared as SQuAD's evaluation does: in lower case, without punctuation and articles.

    Args:
        answer: what was written.
        right: right answers.
    """
    said = normalised(answer)
    wanted = [words for words in map(normalised, right) if words]
    return Score(
        contains=any(f" {' '.join(words)} " in f" {' '.join(said)} " for words in wanted),
        exact=any(words == said for words in wanted),
        f1=max((_f1(said, words) for words in wanted), default=0.0),
    )


def normalised(text: str) -> list[str]:
    """Returns the words of an answer that are compared."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return ARTICLES.sub(" ", bare).split()


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    same = sum((Counter(said) & Counter(wanted)).values())
    if same == 0:
        return 0.0
    return 2 * same / (len(said) + len(wanted))
