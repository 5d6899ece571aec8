"""An answer, and which text was read for each of its tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from landmark.data.sources import Source
from landmark.texts.page import View, page
from landmark.texts.passages import Passage, Span, join_neighbours

PASSAGES = 5


@dataclass(frozen=True)
class Step:
    """What was retrieved by the query that gave one token.

    Attributes:
        token: text of the token; empty where its bytes make a character only with those of the
            next.
        spans: retrieved blocks that hold text of the sources, by block.
    """

    token: str
    spans: tuple[Span, ...]

    @property
    def rest(self) -> float:
        """Share of what is seen without retrieval: local text, question, answer so far."""
        return max(0.0, 1.0 - sum(span.weight for span in self.spans))


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
        """Returns what was read over the whole answer, by block: the mean over its tokens."""
        sums: dict[int, Span] = {}
        for span in itertools.chain.from_iterable(step.spans for step in self.steps):
            before = sums[span.block].weight if span.block in sums else 0.0
            sums[span.block] = Span(
                span.block, span.begin, span.end, before + span.weight / len(self.steps)
            )
        return tuple(sums[block] for block in sorted(sums))

    def passages(self, step: int | None = None, count: int = PASSAGES) -> tuple[Passage, ...]:
        """Returns the passages that were read most, the strongest first.

        Args:
            step: of which token; ``None`` for the whole answer.
            count: blocks that are taken, the strongest; neighbours make one passage.
        """
        spans = self.spans() if step is None else self.steps[step].spans
        strongest = sorted(spans, key=lambda span: (-span.weight, span.block))[:count]
        passages = join_neighbours(sorted(strongest, key=lambda span: span.block), self.sources)
        return tuple(sorted(passages, key=lambda passage: -passage.weight))

    def html(self) -> str:
        """Returns an HTML page that shows the text with its heat, token by token.

        The page needs no network and no other file.
        """
        whole = View(self.spans(), self.passages())
        each = [View(step.spans, self.passages(index)) for index, step in enumerate(self.steps)]
        return page(
            question=self.question,
            sources=self.sources,
            tokens=[step.token for step in self.steps],
            views=[whole, *each],
        )
