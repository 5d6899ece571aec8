"""Named texts that are read one after the other, and the characters of each of their tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landmark.data.encoding import Progress
from landmark.data.tokenizer import encode, row_start


@dataclass(frozen=True)
class Source:
    """A text and its name.

    Attributes:
        name: a path, or another name that a reader knows.
        text: its characters.
    """

    name: str
    text: str

    def line(self, character: int) -> int:
        """Returns the line of a character, counted from 1; lines end in LF, CR LF or CR."""
        ends = self.text.count("\n", 0, character) + self.text.count("\r", 0, character)
        return ends - self.text.count("\r\n", 0, character + 1) + 1


def starts_of(sources: Sequence[Source]) -> tuple[int, ...]:
    """Returns the first character of each source, and the number of all characters."""
    return tuple(itertools.accumulate((len(source.text) for source in sources), initial=0))


@dataclass(frozen=True)
class Reading:
    """Sources one after the other, as a memory reads them.

    Attributes:
        sources: the sources; characters are counted over all of them, with nothing between two.
        ids: ``(n,)`` int64 text tokens, those that the tokenizer puts before every text included.
        spans: ``(n, 2)`` int64, first character of each token and the one after its last; equal for
            a special token. The spans of two tokens of one character, as byte-level tokenizers make
            them, both hold it.
    """

    sources: tuple[Source, ...]
    ids: Tensor
    spans: Tensor

    @property
    def starts(self) -> tuple[int, ...]:
        """First character of each source, and the number of all characters."""
        return starts_of(self.sources)

    def of_block(self, block: int, text_per_block: int) -> tuple[int, int]:
        """Returns the first character of a block and the one after its last.

        Both are equal where the block holds no text of a source.

        Args:
            block: index of the block.
            text_per_block: text tokens of a block.
        """
        spans = self.spans[block * text_per_block : (block + 1) * text_per_block]
        if len(spans) == 0:
            return self.starts[-1], self.starts[-1]
        return int(spans[:, 0].min()), int(spans[:, 1].max())


def read_sources(
    sources: Sequence[Source],
    tokenizer: Any,
    progress: Progress | None = None,
    *,
    opening: str | None = None,
) -> Reading:
    """Tokenises sources of any length; each continues the one before it.

    Args:
        sources: the sources, in the order of reading.
        tokenizer: a fast tokenizer of transformers.
        progress: called while a long source is tokenised.
        opening: what a conversation begins with before them (``landmark.data.chat.opening``), in
            place of what the tokenizer puts before every text; ``None`` for no conversation.

    Raises:
        ValueError: no text, none that the tokenizer finds a token in, or a tokenizer that does not
            know the characters of its tokens.
    """
    if not any(source.text for source in sources):
        raise ValueError(
            f"text: expected at least one character, got {len(sources)} empty texts; pass a text"
        )
    prefix = row_start(tokenizer)
    if opening is not None:
        prefix = encode(tokenizer, opening).ids.tolist()
    ids = [torch.tensor(prefix, dtype=torch.long)]
    spans = [torch.zeros(len(prefix), 2, dtype=torch.long)]
    first = 0  # first character of the source
    has_tokens = False
    for source in sources:
        continues = has_tokens or bool(opening)
        found = encode(tokenizer, source.text, continues=continues, progress=progress)
        ids.append(torch.from_numpy(found.ids))
        spans.append(torch.from_numpy(found.spans + first))
        first += len(source.text)
        has_tokens = has_tokens or len(found) > 0
    if not has_tokens:
        raise ValueError(
            "text: expected at least one token, got none in "
            f"{', '.join(source.name for source in sources[:3])}: the tokenizer drops all of its "
            "characters; pass another text"
        )
    return Reading(tuple(sources), torch.cat(ids), torch.cat(spans))
