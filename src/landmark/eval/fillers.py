"""Token streams of any length that documents are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark.data.encoding import Progress
from landmark.data.tokenizer import encoder_of
from landmark.texts.files import file_text
from landmark.texts.reading import tokenize

PAPER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Filler:
    """A stream of token ids that starts again when it ends.

    Attributes:
        name: ``paper``, ``pydoc`` or a path.
        ids: ``(n,)`` int64, the first round, as it begins a row.
        again: ``(m,)`` int64, every further round, as it goes on from the one before; ``None`` for
            the same.
    """

    name: str
    ids: Tensor
    again: Tensor | None = None

    def take(self, start: int, count: int) -> Tensor:
        """Returns ``count`` ids from token index ``start`` on, ``(count,)``."""
        again = self.ids if self.again is None else self.again
        rounds = -(-max(0, start + count - len(self.ids)) // len(again))
        return torch.cat((self.ids, again.repeat(rounds)))[start : start + count]


def load_filler(name: str, tokenizer: Any, progress: Progress | None = None) -> Filler:
    """Tokenises a filler once.

    Args:
        name: ``paper`` (the paper's sentence), ``pydoc`` (the Python language reference that every
            Python carries), or a text file or folder of .txt files.
        tokenizer: of transformers, a fast one.
        progress: called while a long text is tokenised.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is empty or no UTF-8 text, or a slow tokenizer.
    """
    return made_filler(name, filler_text(name), tokenizer, progress)


def filler_text(name: str) -> str:
    """Returns the text of a filler; raises as ``load_filler``."""
    if name == "paper":
        return PAPER + " "
    if name == "pydoc":
        return pydoc_text()
    return file_text(Path(name), "fillers", others="paper, pydoc, ")


def made_filler(
    name: str,
    text: str,
    tokenizer: Any,
    progress: Progress | None = None,
    parameter: str = "fillers",
) -> Filler:
    """Tokenises a text that is repeated as often as needed.

    Args:
        name: of the filler.
        text: of the filler.
        tokenizer: of transformers, a fast one.
        progress: called while a long text is tokenised.
        parameter: that the text was given by, for the message.

    Raises:
        ValueError: a slow tokenizer, or one that finds no token in the text.
    """
    first = tokenize(text, tokenizer, progress=progress)
    if len(first) == 0:
        raise ValueError(
            f"{parameter}: expected a text of at least one token, got none in {name}; pass "
            "another text"
        )
    if not encoder_of(tokenizer).prefixes:
        return Filler(name, first)
    return Filler(name, first, tokenize(text, tokenizer, continues=True, progress=progress))


def pydoc_text() -> str:
    """Returns the language reference that Python's ``help()`` shows, topic after topic."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
