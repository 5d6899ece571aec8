"""Rows in which answers have to be found: questions about a few of many documents.

A row is a conversation: the user gives many documents and asks, the assistant answers. Only one or
a few of the documents hold the answers; the others are taken from the same set and from others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from landmark.data.asking import Frame, Turn, asked_row, frame_of
from landmark.data.chat import SEPARATOR
from landmark.data.encoding import Encoded
from landmark.data.episodes import Row
from landmark.data.questions import DocumentQuestion, QuestionSet
from landmark.data.tokenizer import encode

SAME_SET_SHARE = 0.5  # of rows that are filled up from the same set first
SHORTEST_PIECE = 16  # tokens of a document that is cut


@dataclass(frozen=True)
class _Piece:
    """A document of a row, or a part of it.

    Attributes:
        ids: its tokens, with the separator behind it.
        evidence: for a question by its number in the row, tokens of the piece that answer it.
    """

    ids: list[int]
    evidence: dict[int, list[range]] = field(default_factory=dict)


class _Asked(NamedTuple):
    """A question, by the number of its set and its index there."""

    set: int
    question: int


class Haystacks:
    """Makes rows of documents with questions about some of them.

    The documents with the evidence stand anywhere among others. A document that is longer than its
    share of the row is cut around its evidence. Loss is taken on the answers alone.

    Args:
        sets: documents with questions.
        tokenizer: a fast tokenizer of transformers. Without a chat template the conversation has
            the plain form of ``landmark.data.chat``.
        tokens: text tokens of a row.
        seed: decides a row together with its number.
        questions: largest number of questions in a row. Those of one set come first, in turns of a
            random order; where it has fewer, they are followed by those of other sets.
    """

    def __init__(
        self,
        sets: Sequence[QuestionSet],
        tokenizer: Any,
        *,
        tokens: int,
        seed: int,
        questions: int = 4,
    ) -> None:
        self.sets = sets
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.seed = seed
        self.questions = questions
        self._asked_of = [
            [_Asked(number, index) for index in range(len(each.questions))]
            for number, each in enumerate(sets)
        ]
        self._documents = sum(len(each.documents) for each in sets)
        self._asked = [asked for of_set in self._asked_of for asked in of_set]
        self._separator: list[int] = encode(tokenizer, SEPARATOR, continues=True).ids.tolist()
        self._encoded = lru_cache(maxsize=1 << 16)(self._encode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoded": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encoded = lru_cache(maxsize=1 << 16)(self._encode)

    def __call__(self, number: int) -> Row:
        """Returns row ``number``; the same for the same seed.

        Raises:
            ValueError: a question and its answer do not fit the row.
        """
        rng = random.Random(f"{self.seed}:{number}")
        asked = self._drawn(rng)
        where = self.sets[asked[0].set].where
        while True:
            questions = [self._question(each) for each in asked]
            turns = [Turn(question.question, question.answer) for question in questions]
            frame = frame_of(self.tokenizer, turns, where)
            room = frame.room(self.tokens)
            needed = {
                (each.set, span.document)
                for each, question in zip(asked, questions, strict=True)
                for span in question.evidence
            }
            fits = room >= SHORTEST_PIECE * len(needed)
            if len(asked) == 1 or (fits and len(needed) < self._documents):
                break
            asked.pop()
        if not fits:
            raise ValueError(
                f"{where}: expected a question and an answer that leave room for a document in "
                f"{self.tokens} tokens, got {len(frame.after)}; lengthen the rows, or leave the "
                "question out"
            )
        pieces = self._pieces(rng, asked, sorted(needed), room)
        return _joined(frame, pieces, len(asked))

    def _drawn(self, rng: random.Random) -> list[_Asked]:
        """Returns the questions of a row: as many of one set as there are, then of others."""
        first = rng.choice(self._asked)
        others = [each for each in self._asked_of[first.set] if each != first]
        count = rng.randint(1, self.questions) - 1
        asked = [first, *rng.sample(others, min(count, len(others)))]
        rng.shuffle(asked)
        while len(asked) <= count and len(self._asked) > len(asked):
            other = rng.choice(self._asked)
            if other not in asked:
                asked.append(other)
        return asked

    def _question(self, asked: _Asked) -> DocumentQuestion:
        return self.sets[asked.set].questions[asked.question]

    def _pieces(
        self,
        rng: random.Random,
        asked: Sequence[_Asked],
        needed: Sequence[tuple[int, int]],
        room: int,
    ) -> list[_Piece]:
        """Returns documents of exactly ``room`` tokens, those with the evidence among them."""
        largest = room // len(needed)
        pieces = [self._with_evidence(each, asked, largest=largest) for each in needed]
        left = room - sum(len(piece.ids) for piece in pieces)
        for other, document in self._others(rng, asked[0].set, set(needed)):
            if left == 0:
                break
            ids = [*self._encoded(other, document).ids.tolist(), *self._separator][:left]
            pieces.append(_Piece(ids))
            left -= len(ids)
        rng.shuffle(pieces)
        return pieces

    def _with_evidence(
        self, needed: tuple[int, int], asked: Sequence[_Asked], *, largest: int
    ) -> _Piece:
        """Returns a document, given by its set and its index, or the part with the evidence."""
        encoded = self._encoded(*needed)
        spans = [
            (number, encoded.tokens_of(span.begin, span.end))
            for number, each in enumerate(asked)
            for span in self._question(each).evidence
            if (each.set, span.document) == needed
        ]
        first = 0
        length = largest - len(self._separator)
        if len(encoded) > length:
            begin = min(tokens.start for _, tokens in spans)
            end = max(tokens.stop for _, tokens in spans)
            around = max(0, length - (end - begin)) // 2
            first = max(0, min(begin - around, len(encoded) - length))
        ids = [*encoded.ids[first : first + length].tolist(), *self._separator]
        evidence: dict[int, list[range]] = {}
        for number, tokens in spans:
            kept = range(max(0, tokens.start - first), min(length, tokens.stop - first))
            if len(kept) > 0:
                evidence.setdefault(number, []).append(kept)
        return _Piece(ids, evidence)

    def _others(
        self, rng: random.Random, chosen: int, needed: set[tuple[int, int]]
    ) -> Iterator[tuple[int, int]]:
        """Yields documents without end: in a share of the rows those of the same set first.

        Raises:
            ValueError: there are none but those with the evidence.
        """
        same = [
            (chosen, document)
            for document in range(len(self.sets[chosen].documents))
            if (chosen, document) not in needed
        ]
        if len(needed) == self._documents:
            raise ValueError(
                f"{self.sets[chosen].where}: expected further documents to fill a row of "
                f"{self.tokens} tokens, got none but those with the answers; add documents"
            )
        if rng.random() < SAME_SET_SHARE:
            rng.shuffle(same)
            yield from same
        while True:
            other = rng.randrange(len(self.sets))
            document = rng.randrange(len(self.sets[other].documents))
            if (other, document) not in needed:
                yield other, document

    def _encode(self, number: int, document: int) -> Encoded:
        text = self.sets[number].documents[document]
        return encode(self.tokenizer, text, continues=True)


def _joined(frame: Frame, pieces: Sequence[_Piece], count: int) -> Row:
    """Returns a row of documents with ``count`` questions."""
    ids: list[int] = []
    evidence: list[list[range]] = [[] for _ in range(count)]
    for piece in pieces:
        for number, spans in piece.evidence.items():
            evidence[number] += [
                range(len(ids) + tokens.start, len(ids) + tokens.stop) for tokens in spans
            ]
        ids += piece.ids
    return asked_row(frame, ids, evidence)
