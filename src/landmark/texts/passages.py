"""Where retrieved blocks stand in the sources: spans of characters, and passages of spans."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from landmark.data.sources import Source, starts_of


@dataclass(frozen=True)
class Span:
    """A retrieved block.

    Attributes:
        block: its index in the memory.
        begin: its first character, counted over all sources.
        end: the one after its last.
        weight: its share of the attention: the mean gate weight over layers and heads.
    """

    block: int
    begin: int
    end: int
    weight: float


@dataclass(frozen=True)
class Passage:
    """Retrieved blocks that stand side by side in one source.

    Attributes:
        source: the source's name.
        line: the line that it begins in, counted from 1.
        begin: its first character, counted over all sources.
        end: the one after its last.
        text: its characters.
        weight: share of the attention of its strongest block, so that many weak blocks do not
            outweigh the one that was read. A block across the border of two sources is part of a
            passage in both: which part was read is not known.
    """

    source: str
    line: int
    begin: int
    end: int
    text: str
    weight: float


def join_neighbours(spans: Sequence[Span], sources: Sequence[Source]) -> Iterator[Passage]:
    """Yields a passage for each run of neighbouring blocks in one source.

    Args:
        spans: by block.
        sources: the texts that characters are counted over.
    """
    for source, (start, end) in zip(sources, itertools.pairwise(starts_of(sources)), strict=True):
        inside = [span for span in spans if span.begin < end and span.end > start]
        for run in _runs(inside):
            first = max(run[0].begin, start) - start
            last = min(run[-1].end, end) - start
            yield Passage(
                source=source.name,
                line=source.line(first),
                begin=start + first,
                end=start + last,
                text=source.text[first:last],
                weight=max(span.weight for span in run),
            )


def _runs(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Yields spans of consecutive blocks together."""
    run: list[Span] = []
    for span in spans:
        if run and span.block != run[-1].block + 1:
            yield run
            run = []
        run.append(span)
    if run:
        yield run
