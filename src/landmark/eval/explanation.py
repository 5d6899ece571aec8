"""What was read for each token of an answer, in characters of the sources."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from landmark.data.sources import Source

PASSAGES = 5


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
class Step:
    """What was retrieved by the query that gave one token.

    Attributes:
        token: text of the token; empty where its bytes make a character only with those of the
            next.
        spans: retrieved blocks that hold text of the sources, by place.
    """

    token: str
    spans: tuple[Span, ...]

    @property
    def rest(self) -> float:
        """Share of what is seen without retrieval: the nearest text, the question and the answer so
        far.
        """
        return max(0.0, 1.0 - sum(span.weight for span in self.spans))


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


@dataclass(frozen=True)
class Explanation:
    """An answer and what was read for it.

    Attributes:
        sources: the texts; characters are counted over all of them, one after the other.
        question: what was asked.
        answer: what the model wrote; the tokens' texts joined.
        steps: one for each token of the answer.
    """

    sources: tuple[Source, ...]
    question: str
    answer: str
    steps: tuple[Step, ...]

    def spans(self) -> tuple[Span, ...]:
        """Returns what was read over the whole answer: the mean over its tokens, by place."""
        sums: dict[int, Span] = {}
        for span in itertools.chain.from_iterable(step.spans for step in self.steps):
            before = sums[span.block].weight if span.block in sums else 0.0
            sums[span.block] = Span(
                span.block, span.begin, span.end, before + span.weight / len(self.steps)
            )
        return tuple(sums[block] for block in sorted(sums))

    def passages(self, step: int | None = None, count: int = PASSAGES) -> tuple[Passage, ...]:
        """Returns what was read most, the strongest first.

        Args:
            step: of which token; ``None`` for the whole answer.
            count: blocks that are taken, the strongest; neighbours make one passage.
        """
        spans = self.spans() if step is None else self.steps[step].spans
        strongest = sorted(spans, key=lambda span: (-span.weight, span.block))[:count]
        passages = _passages(sorted(strongest, key=lambda span: span.block), self.sources)
        return tuple(sorted(passages, key=lambda passage: -passage.weight))

    def html(self) -> str:
        """Returns a page that shows the text with its heat, token by token; it needs nothing but
        itself.
        """
        from landmark.eval.heat import page

        return page(self)


def _passages(spans: Sequence[Span], sources: Sequence[Source]) -> Iterator[Passage]:
    start = 0
    for source in sources:
        end = start + len(source.text)
        inside = [span for span in spans if span.begin < end and span.end > start]
        for _, group in itertools.groupby(
            enumerate(inside), key=lambda pair: pair[1].block - pair[0]
        ):
            run = [span for _, span in group]
            first = max(run[0].begin, start) - start
            last = min(run[-1].end, end) - start
            weight = max(span.weight for span in run)
            text = source.text[first:last]
            yield Passage(
                source.name, source.line(first), start + first, start + last, text, weight
            )
        start = end
