"""Named texts read one after the other, and where each of their tokens stands in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landmark.data.tokenizer import row_start

_PIECE = 1 << 16


@dataclass(frozen=True)
class Source:
    """A text and its name.

    Attributes:
        name: a path, or whatever the reader knows it by.
        text: its characters.
    """

    name: str
    text: str

    def line(self, place: int) -> int:
        """Returns the line, counted from 1, of the character ``place``; lines end in LF, CR LF or CR."""
        ends = self.text.count("\n", 0, place) + self.text.count("\r", 0, place)
        return ends - self.text.count("\r\n", 0, place + 1) + 1


@dataclass(frozen=True)
class Reading:
    """Sources one after the other, as a memory reads them.

    Attributes:
        sources: what is read; characters are counted over all of them, nothing between two.
        ids: ``(n,)`` int64 text tokens, one that the tokenizer begins every text with included.
        spans: ``(n, 2)`` int64, first character of each token and the one after its last; equal for a special token.
            Tokens that share a character, as byte-level tokenizers make them, have it both.
    """

    sources: tuple[Source, ...]
    ids: Tensor
    spans: Tensor

    @property
    def starts(self) -> tuple[int, ...]:
        """First character of each source, and the number of all characters."""
        return tuple(itertools.accumulate((len(source.text) for source in self.sources), initial=0))

    def of_block(self, block: int, text_per_block: int) -> tuple[int, int]:
        """Returns the first character of a block and the one after its last; equal where it holds no source's text."""
        spans = self.spans[block * text_per_block : (block + 1) * text_per_block]
        if len(spans) == 0:
            return self.starts[-1], self.starts[-1]
        return int(spans[:, 0].min()), int(spans[:, 1].max())


def read_sources(sources: Sequence[Source], tokenizer: Any) -> Reading:
    """Tokenises sources of any length.

    Args:
        sources: in the order in which they are read.
        tokenizer: of transformers, a fast one.

    Raises:
        ValueError: no text, or a tokenizer that does not know the characters of its tokens.
    """
    if not any(source.text for source in sources):
        raise ValueError(f"text: expected at least one character, got {len(sources)} empty texts; pass a text")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer: expected a fast one, which knows the characters of its tokens, "
            f"got {type(tokenizer).__name__}; load it with AutoTokenizer from a folder with tokenizer.json"
        )
    begin = row_start(tokenizer)
    ids, spans, at = list(begin), [(0, 0)] * len(begin), 0
    for source in sources:
        for piece in pieces(source.text):
            found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids += found["input_ids"]
            spans += [(at + first, at + last) for first, last in found["offset_mapping"]]
            at += len(piece)
    return Reading(tuple(sources), torch.tensor(ids), torch.tensor(spans))


def pieces(text: str) -> Iterator[str]:
    """Cuts a text at line ends into pieces that a tokenizer takes in its stride; joined, they are the text."""
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)
