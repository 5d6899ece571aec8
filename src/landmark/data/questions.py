"""Documents with questions about them, and rows in which the answers have to be found.

A row is a conversation: the user gives many documents and asks, the assistant answers. Only one or
a few of the documents hold the answers; the others are taken from the same article and from others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from landmark.data.asking import Frame, Turn, asked_row, frame_of
from landmark.data.characters import without_surrogates
from landmark.data.chat import SEPARATOR
from landmark.data.encoding import Encoded
from landmark.data.episodes import Row
from landmark.data.text import Record, read_rows
from landmark.data.tokenizer import encode

SAME_ARTICLE_SHARE = 0.5  # of rows that are filled up from the same article first
SHORTEST_PIECE = 16  # tokens of a document that is cut
SHOWN_CHARACTERS = 60


class Evidence(NamedTuple):
    """Characters of a document that answer a question.

    Attributes:
        document: index of the document.
        begin: first character.
        end: the one after the last.
    """

    document: int
    begin: int
    end: int


@dataclass(frozen=True)
class DocumentQuestion:
    """A question about documents.

    Attributes:
        question: its words.
        answer: the answer.
        evidence: where the documents say it.
        others: further right answers.
    """

    question: str
    answer: str
    evidence: tuple[Evidence, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Documents that belong together, such as the paragraphs of an article, and questions.

    Attributes:
        where: names the set in messages.
        documents: texts.
        questions: questions about them.
    """

    where: str
    documents: tuple[str, ...]
    questions: tuple[DocumentQuestion, ...]


def read_question_sets(source: str | Path, *, split: str = "train") -> Iterator[QuestionSet]:
    """Reads documents with questions about them.

    Args:
        source: SQuAD JSON, or rows (``.jsonl``, ``.json`` or a data set of the hub) with
            ``documents``, a list of texts; ``questions``, a list of strings; ``answers``, a string
            for each question, or a list of strings of which the first counts; and ``evidence``, for
            each question a list of ``[document, begin, end]`` with the index of a document and
            characters in it. Without ``evidence`` it is where the answer first stands.
        split: which part of a data set to read.

    Raises:
        FileNotFoundError: there is no such file or data set.
        ModuleNotFoundError: a hub name without the package ``datasets``.
        ValueError: rows of another form, an answer that is not in a document, evidence out of
            range, or no question at all.
    """
    found = False
    for row in read_rows(source, split=split):
        if not isinstance(row.value, dict):
            raise ValueError(
                f"{row.where}: expected an object, got {type(row.value).__name__}; write "
                "documents, questions and answers"
            )
        articles = row.value.get("data")
        sets = (
            (_article(article, row.where) for article in articles)
            if isinstance(articles, list)
            else [_question_set(row)]
        )
        for each in sets:
            if each.questions:
                found = True
                yield each
    if not found:
        raise ValueError(
            f"{source}: expected at least one question with an answer, got none; name another file"
        )


def first_questions(sets: Sequence[QuestionSet], count: int | None) -> list[QuestionSet]:
    """Returns sets with their first ``count`` questions in all, ``None`` for all of them.

    All documents stay.

    Raises:
        ValueError: a count below 1.
    """
    if count is None:
        return list(sets)
    if count < 1:
        raise ValueError(f"questions: expected at least 1, got {count}; pass for example 100")
    kept = []
    for each in sets:
        kept.append(replace(each, questions=each.questions[:count]))
        count -= len(kept[-1].questions)
    return kept


def _article(article: Any, where: str) -> QuestionSet:
    """Reads an article of SQuAD JSON, without the questions that have no answer."""
    try:
        title = str(article["title"])
        documents = tuple(str(paragraph["context"]) for paragraph in article["paragraphs"])
        questions = []
        for number, paragraph in enumerate(article["paragraphs"]):
            for asked in paragraph["qas"]:
                if asked["answers"] and not asked.get("is_impossible"):
                    answer = str(asked["answers"][0]["text"])
                    begin = int(asked["answers"][0]["answer_start"])
                    evidence = Evidence(number, begin, begin + len(answer))
                    others = tuple(str(other["text"]) for other in asked["answers"][1:])
                    questions.append(
                        DocumentQuestion(str(asked["question"]), answer, (evidence,), others)
                    )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{where}: expected SQuAD JSON (title, paragraphs with context and qas), got another "
            f"form ({type(error).__name__}: {error}); mend it"
        ) from None
    found = QuestionSet(f"{where}, {title}", documents, tuple(questions))
    for asked_ in questions:
        _require_evidence(found, asked_)
        (evidence,) = asked_.evidence
        said = documents[evidence.document][evidence.begin : evidence.end]
        if said != asked_.answer:
            raise ValueError(
                f"{found.where}: expected the answer {_shown(asked_.answer)} at character "
                f"{evidence.begin} of its paragraph, got {_shown(said)}; mend answer_start"
            )
    return found


def _question_set(row: Record) -> QuestionSet:
    """Reads a row with documents, questions and answers."""
    value = row.value
    documents = _strings(value.get("documents"), f"{row.where}: documents")
    questions = _strings(value.get("questions"), f"{row.where}: questions")
    answers = value.get("answers")
    evidence = value.get("evidence")
    for name, given in {"answers": answers, "evidence": evidence}.items():
        if name == "evidence" and given is None:
            continue
        if not isinstance(given, list) or len(given) != len(questions):
            count = len(given) if isinstance(given, list) else type(given).__name__
            raise ValueError(
                f"{row.where}: {name}: expected a list with an entry for each of the "
                f"{len(questions)} questions, got {count}; write one"
            )
    asked = []
    for number, question in enumerate(questions):
        given = answers[number] if _is_list(answers[number]) else [answers[number]]
        answer = given[0]
        others = tuple(other for other in given[1:] if isinstance(other, str))
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f"{row.where}: answers: expected a string for question {number + 1}, got "
                f"{answer!r}; write one"
            )
        if evidence is None:
            spans = _first_mention(documents, answer, row.where)
        else:
            spans = _spans(evidence[number], row.where)
        asked.append(DocumentQuestion(question, without_surrogates(answer), spans, others))
    found = QuestionSet(row.where, documents, tuple(asked))
    for each in asked:
        _require_evidence(found, each)
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0


def _strings(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(
            f"{what}: expected a list of at least one string, got {type(value).__name__}; write one"
        )
    return tuple(without_surrogates(text) for text in value)


def _first_mention(documents: Sequence[str], answer: str, where: str) -> tuple[Evidence, ...]:
    for number, document in enumerate(documents):
        begin = document.find(answer)
        if begin >= 0:
            return (Evidence(number, begin, begin + len(answer)),)
    raise ValueError(
        f"{where}: expected an answer that stands in a document, got {_shown(answer)}, which does "
        "not; write where the documents say it under evidence, as [document, begin, end]"
    )


def _spans(value: Any, where: str) -> tuple[Evidence, ...]:
    is_list = isinstance(value, list) and len(value) > 0
    if not is_list or not all(
        isinstance(span, list) and len(span) == 3 and all(type(number) is int for number in span)
        for span in value
    ):
        raise ValueError(
            f"{where}: evidence: expected a list of [document, begin, end], three integers each, "
            f"for each question, got {value!r}; write one"
        )
    return tuple(Evidence(*span) for span in value)


def _require_evidence(found: QuestionSet, asked: DocumentQuestion) -> None:
    """Raises ``ValueError`` for evidence that is not in the documents."""
    for span in asked.evidence:
        count = len(found.documents)
        if not 0 <= span.document < count:
            raise ValueError(
                f"{found.where}: evidence: expected a document from 0 to {count - 1}, got "
                f"{span.document}; mend it"
            )
        length = len(found.documents[span.document])
        if not 0 <= span.begin < span.end <= length:
            raise ValueError(
                f"{found.where}: evidence: expected characters in document {span.document}, which "
                f"has {length}, got {span.begin} to {span.end}; mend them"
            )


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


@dataclass(frozen=True)
class _Piece:
    """A document of a row, or a part of it.

    Attributes:
        ids: its tokens, with the separator behind it.
        evidence: for a question by its number in the row, tokens of the piece that answer it.
    """

    ids: list[int]
    evidence: dict[int, list[range]] = field(default_factory=dict)


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
        questions: largest number of questions in a row, all about documents of one set.
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
        self._asked = [
            (number, index)
            for number, each in enumerate(sets)
            for index in range(len(each.questions))
        ]
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
        chosen, first = rng.choice(self._asked)
        others = [index for index in range(len(self.sets[chosen].questions)) if index != first]
        count = rng.randint(1, self.questions) - 1
        asked = [first, *rng.sample(others, min(count, len(others)))]
        while True:
            turns = [
                Turn(question.question, question.answer)
                for question in (self.sets[chosen].questions[index] for index in asked)
            ]
            frame = frame_of(self.tokenizer, turns, self.sets[chosen].where)
            room = frame.room(self.tokens)
            needed = {
                span.document
                for index in asked
                for span in self.sets[chosen].questions[index].evidence
            }
            if room >= SHORTEST_PIECE * len(needed):
                break
            if len(asked) == 1:
                raise ValueError(
                    f"{self.sets[chosen].where}: expected a question and an answer that leave room "
                    f"for a document in {self.tokens} tokens, got {len(frame.after)}; lengthen the "
                    "rows, or leave the question out"
                )
            asked.pop()
        pieces = self._pieces(rng, chosen, asked, sorted(needed), room)
        return _joined(frame, pieces, len(asked))

    def _pieces(
        self,
        rng: random.Random,
        chosen: int,
        asked: Sequence[int],
        needed: Sequence[int],
        room: int,
    ) -> list[_Piece]:
        """Returns documents of exactly ``room`` tokens, those with the evidence among them."""
        largest = room // len(needed)
        pieces = [
            self._with_evidence(chosen, document, asked, largest=largest) for document in needed
        ]
        left = room - sum(len(piece.ids) for piece in pieces)
        for other, document in self._others(rng, chosen, set(needed)):
            if left == 0:
                break
            ids = [*self._encoded(other, document).ids.tolist(), *self._separator][:left]
            pieces.append(_Piece(ids))
            left -= len(ids)
        rng.shuffle(pieces)
        return pieces

    def _with_evidence(
        self, chosen: int, document: int, asked: Sequence[int], *, largest: int
    ) -> _Piece:
        """Returns a document, or the part of it that holds the evidence."""
        encoded = self._encoded(chosen, document)
        spans = [
            (number, encoded.tokens_of(span.begin, span.end))
            for number, index in enumerate(asked)
            for span in self.sets[chosen].questions[index].evidence
            if span.document == document
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
        self, rng: random.Random, chosen: int, needed: set[int]
    ) -> Iterator[tuple[int, int]]:
        """Yields documents without end: in a share of the rows those of the same set first.

        Raises:
            ValueError: there are none but those with the evidence.
        """
        same = [n for n in range(len(self.sets[chosen].documents)) if n not in needed]
        if len(self.sets) == 1 and not same:
            raise ValueError(
                f"{self.sets[chosen].where}: expected further documents to fill a row of "
                f"{self.tokens} tokens, got none but those with the answers; add documents"
            )
        if rng.random() < SAME_ARTICLE_SHARE:
            rng.shuffle(same)
            yield from ((chosen, document) for document in same)
        while True:
            other = rng.randrange(len(self.sets))
            document = rng.randrange(len(self.sets[other].documents))
            if other != chosen or document not in needed:
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
