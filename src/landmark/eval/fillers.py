"""What a document is made of: token streams of any length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark.data.sources import pieces
from landmark.data.text import read_documents

PAPER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Filler:
    """A stream of token ids that starts again when it ends.

    Attributes:
        name: ``paper``, ``pydoc`` or a path.
        ids: ``(n,)`` int64, one round.
    """

    name: str
    ids: Tensor

    def take(self, start: int, count: int) -> Tensor:
        """Returns ``count`` ids from place ``start`` on, ``(count,)``."""
        return self.ids[(start + torch.arange(count)) % len(self.ids)]


def load_filler(name: str, tokenizer: Any) -> Filler:
    """Tokenises a filler once.

    Args:
        name: ``paper`` (the paper's sentence), ``pydoc`` (the Python language reference that every Python carries), or
            a text file or folder of .txt files.
        tokenizer: of transformers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is empty or no UTF-8 text.
    """
    if name == "paper":
        return Filler(name, tokenize(PAPER + " ", tokenizer))
    text = pydoc_text() if name == "pydoc" else file_text(Path(name), "--filler")
    return Filler(name, tokenize(text, tokenizer))


def pydoc_text() -> str:
    """Returns the language reference that Python's ``help()`` shows, topic after topic."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def file_text(path: Path, option: str) -> str:
    """Returns the text of a file or of a folder of .txt files (of its ``test`` part, where it is divided).

    Raises:
        FileNotFoundError: nothing there; the message begins with ``option``.
        ValueError: empty or no UTF-8 text.
    """
    if not path.exists():
        others = "paper, pydoc, " if option == "--filler" else ""
        raise FileNotFoundError(
            f"{option}: expected {others}a text file or a folder of .txt files, got {path}, which does not exist"
        )
    return "\n\n".join(document.text for document in read_documents(path, split="test"))


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Returns the token ids of a text of any length ``(n,)``, no special tokens; cut at line ends, piece by piece."""
    batches = tokenizer(list(pieces(text)), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in batches for token in ids], dtype=torch.long)
