"""Texts that questions are asked about: their evidence alone, what BM25 finds, haystacks."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from landmark.data.chat import SEPARATOR
from landmark.data.questions import DocumentQuestion, QuestionSet
from landmark.data.tokenizer import encode
from landmark.eval.bm25 import Bm25
from landmark.eval.fillers import Filler

FILLER_PIECE = 128  # tokens of filler between two documents
SHARED_WORDS = 1 / 3  # of a question's words, at most, in the evidence's sentence: "other words"
# Those of Lucene, which BM25 leaves out, and the words that questions are asked with.
STOP_WORDS = """
a an and are as at be but by for if in into is it no not of on or such that the their then there
these they this to was will with what which who whom whose when where why how did does do many much
"""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class AskedText(NamedTuple):
    """A text, and the questions that are asked about it.

    Attributes:
        ids: its tokens.
        questions: the questions.
        evidence: for each of them, tokens of the text that answer it.
    """

    ids: list[int]
    questions: list[DocumentQuestion]
    evidence: list[tuple[range, ...]]


@dataclass
class EncodedDocument:
    """A document with the questions that it answers, as a part of a text.

    Attributes:
        ids: its tokens, with the separator behind it.
        spans: for a question by its number in the unit, tokens that answer it.
    """

    ids: list[int]
    spans: dict[int, list[range]] = dataclasses.field(default_factory=dict)


@dataclass
class Unit:
    """Documents that have to be in one text, as they answer the same questions."""

    documents: list[EncodedDocument]
    questions: list[DocumentQuestion]

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(len(document.ids) for document in self.documents)


# A document, and the number of the first question of its unit.
Piece = tuple[EncodedDocument, int]


def evidence_alone(units: Sequence[Unit]) -> Iterator[AskedText]:
    """Yields a text for each question: the documents that answer it."""
    for unit in units:
        for number, question in enumerate(unit.questions):
            needed = [document for document in unit.documents if number in document.spans]
            text = _joined([(document, 0) for document in needed], unit.questions)
            yield AskedText(text.ids, [question], [text.evidence[number]])


def found_by_bm25(
    units: Sequence[Unit], others: Sequence[EncodedDocument], tokenizer: Any, tokens: int
) -> Iterator[AskedText]:
    """Yields a text for each question: the best documents by BM25, the best first."""
    documents = [document for unit in units for document in unit.documents]
    documents += others
    index = Bm25([tokenizer.decode(document.ids) for document in documents])
    first = 0  # of the unit's documents
    for unit in units:
        own = range(first, first + len(unit.documents))
        first = own.stop
        for number, question in enumerate(unit.questions):
            scores = index.scores(question.question)
            ids: list[int] = []
            spans: list[range] = []
            for at in sorted(range(len(scores)), key=lambda each: -scores[each]):
                document = documents[at]
                for span in document.spans.get(number, ()) if at in own else ():
                    end = min(len(ids) + span.stop, tokens)
                    if len(ids) + span.start < end:
                        spans.append(range(len(ids) + span.start, end))
                ids += document.ids[: tokens - len(ids)]
                if len(ids) == tokens:
                    break
            yield AskedText(ids, [question], [tuple(spans)])


def haystacks(
    units: Sequence[Unit],
    others: Sequence[EncodedDocument],
    filler: Filler,
    length: int,
    rng: random.Random,
) -> list[AskedText]:
    """Packs documents into texts of ``length`` tokens, each with as many units as fit.

    What is left is filled with documents that answer nothing, then with filler. All stand in a
    random order.

    Raises:
        ValueError: a unit that is longer than a text.
    """
    waiting = list(units)
    rng.shuffle(waiting)
    spare = list(others)
    rng.shuffle(spare)
    found = []
    at = 0  # in the filler
    while waiting:
        left = length
        taken: list[Unit] = []
        while waiting and waiting[-1].tokens <= left:
            taken.append(waiting.pop())
            left -= taken[-1].tokens
        if not taken:
            raise ValueError(
                f"lengths: expected at least {waiting[-1].tokens} tokens for the documents that "
                f"answer a question, got {length}; pass greater lengths"
            )
        pieces: list[Piece] = []
        questions: list[DocumentQuestion] = []
        for unit in taken:
            pieces += [(document, len(questions)) for document in unit.documents]
            questions += unit.questions
        for document in spare:
            if len(document.ids) <= left:
                pieces.append((document, 0))
                left -= len(document.ids)
        while left > 0:
            count = min(left, FILLER_PIECE)
            pieces.append((EncodedDocument(filler.take(at, count).tolist()), 0))
            at = (at + count) % len(filler.ids)
            left -= count
        rng.shuffle(pieces)
        found.append(_joined(pieces, questions))
    return found


def _joined(pieces: Sequence[Piece], questions: list[DocumentQuestion]) -> AskedText:
    """Joins documents to a text.

    Args:
        pieces: the documents.
        questions: the questions of all units.
    """
    ids: list[int] = []
    evidence: list[list[range]] = [[] for _ in questions]
    for document, first in pieces:
        for number, spans in document.spans.items():
            evidence[first + number] += [
                range(len(ids) + span.start, len(ids) + span.stop) for span in spans
            ]
        ids += document.ids
    return AskedText(ids, questions, [tuple(spans) for spans in evidence])


def units_of(each: QuestionSet, tokenizer: Any) -> list[Unit]:
    """Divides a set into units: documents that answer the same question are in one."""
    home = list(range(len(each.documents)))  # the unit of each document, by its lowest document
    for question in each.questions:
        together = {home[span.document] for span in question.evidence}
        lowest = min(together)
        home = [lowest if unit in together else unit for unit in home]
    separator = encode(tokenizer, SEPARATOR, continues=True).ids.tolist()
    encoded = [encode(tokenizer, text, continues=True) for text in each.documents]
    documents = [EncodedDocument([*found.ids.tolist(), *separator]) for found in encoded]
    units = []
    for unit in sorted(set(home)):
        inside = [number for number, its in enumerate(home) if its == unit]
        questions = [
            question for question in each.questions if home[question.evidence[0].document] == unit
        ]
        for number, question in enumerate(questions):
            for span in question.evidence:
                tokens = encoded[span.document].tokens_of(span.begin, span.end)
                documents[span.document].spans.setdefault(number, []).append(tokens)
        units.append(Unit([documents[number] for number in inside], questions))
    return units


def is_in_other_words(question: DocumentQuestion, documents: Sequence[str]) -> bool:
    """Returns whether a question has few words in common with the sentence that answers it.

    Few are at most a third of its words but ``STOP_WORDS``, compared in lower case.

    Args:
        question: the question; the sentences around its evidence count together.
        documents: of its set.
    """
    wanted = set(re.findall(r"\w+", question.question.lower())) - set(STOP_WORDS.split())
    said: set[str] = set()
    for span in question.evidence:
        text = documents[span.document]
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        begin = max((end for end in ends if end <= span.begin), default=0)
        last = min((end for end in ends if end >= span.end), default=len(text))
        said.update(re.findall(r"\w+", text[begin:last].lower()))
    return len(wanted & said) <= SHARED_WORDS * len(wanted)
