"""Synthetic retrieval episodes: a text in which something said earlier is asked for later.

Three kinds: a *pass key* among named codes, *named facts* that must be told apart, and a *passage
quoted again*. The filler is taken from a corpus, in a fifth of the rows a short snippet of it
repeated. Facts are dropped at any token's place, so also across block borders. What a row holds
follows from the seed and its index alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from string import Formatter
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from landmark.data import wordings
from landmark.data.encoding import TextEncoder
from landmark.data.tokens import Ids

IGNORED = -100
KEY_SHARE = 0.40
FACTS_SHARE = 0.45
REPEATED_SHARE = 0.2
INTRODUCTION_SHARE = 0.15
TRIES = 4
PLAIN_SHARE = 0.3
TAIL = 64

Item = TypeVar("Item")
Parsed = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        input_ids: int64 ``(tokens,)``.
        labels: int64 ``(tokens,)``, the ids again, -100 where no loss is taken: at the first token,
            which nothing predicts, and where a code is first mentioned.
        answers: bool ``(tokens,)``, the tokens of codes that were asked for.
    """

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    answers: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class _Segment:
    ids: list[int]
    secret: list[int]
    answer: list[int]


@dataclasses.dataclass(frozen=True)
class _Fact:
    label: str
    name: str
    value: str


def parse(wording: str) -> Parsed:
    """Splits a wording into (literal text, field after it or nothing)."""
    return tuple((literal, field or "") for literal, field, _, _ in Formatter().parse(wording))


KEY_STATEMENTS = tuple(map(parse, wordings.KEY_STATEMENTS))
KEY_QUESTIONS = tuple(map(parse, wordings.KEY_QUESTIONS))
FACT_STATEMENTS = tuple(map(parse, wordings.FACT_STATEMENTS))
FACT_QUESTIONS = tuple(map(parse, wordings.FACT_QUESTIONS))


class Episodes:
    """Makes episodes from a corpus.

    Args:
        tokenizer: the backend of a fast tokenizer.
        ids: the corpus, ``(tokens,)``.
        tokens: text tokens of a row.
        seed: with a row's index decides everything about it.
        prefix: ids that begin every row (``row_start``).

    Raises:
        ValueError: the corpus is shorter than a row, or a row has fewer than 128 tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, ids: Ids, *, tokens: int, seed: int, prefix: Sequence[int] = ()
    ) -> None:
        if len(ids) <= tokens:
            raise ValueError(
                f"expected a text of more than {tokens} tokens (one row), got {len(ids)}; add text"
            )
        if tokens < 2 * TAIL:
            raise ValueError(
                f"expected rows of at least {2 * TAIL} tokens for episodes, got {tokens}; "
                "lengthen the rows"
            )
        self.encoder = TextEncoder(tokenizer)
        self.ids = ids
        self.seed = seed
        self.prefix = list(prefix)
        self.tokens = tokens - len(self.prefix)
        self.ends_sentence = _sentence_ends(tokenizer)

    def __call__(self, index: int) -> Row:
        """Returns row ``index``; the same for the same seed, whatever was asked before."""
        rng = random.Random(f"{self.seed}:{index}")
        kind = rng.random()
        for _ in range(TRIES if kind < KEY_SHARE + FACTS_SHARE else 0):
            segments = self._key(rng) if kind < KEY_SHARE else self._facts(rng)
            taken = sum(len(segment.ids) for segment in segments)
            if taken <= self._room:
                return self._row(
                    self._spread(rng, self._introduction(rng, self._room - taken) + segments)
                )
        return self._quote(rng)

    def _key(self, rng: random.Random) -> list[_Segment]:
        label = _pick(rng, wordings.KEY_LABELS)
        values = _values(rng, 1 + _below(rng, 5))
        key = _Fact(label, "", values[0])
        statements = [self._say(rng, _plain_or(rng, KEY_STATEMENTS), key, "secret")]
        for name, value in zip(_names(rng, len(values) - 1), values[1:], strict=True):
            fact = _Fact(_pick(rng, wordings.FACT_LABELS), name, value)
            statements.append(self._say(rng, _plain_or(rng, FACT_STATEMENTS), fact, "secret"))
        question = self._say(rng, _plain_or(rng, KEY_QUESTIONS), key, "answer")
        kept = self._fitting(statements, [question], needed=1)
        rng.shuffle(kept)
        return [*kept, question]

    def _facts(self, rng: random.Random) -> list[_Segment]:
        values = _values(rng, 1 + _below(rng, 8))
        label = _pick(rng, wordings.FACT_LABELS)
        same = rng.random() < 0.7
        facts = [
            _Fact(label if same else _pick(rng, wordings.FACT_LABELS), name, value)
            for name, value in zip(_names(rng, len(values)), values, strict=True)
        ]
        wording = _plain_or(rng, FACT_STATEMENTS) if rng.random() < 0.7 else None
        asked = min(len(facts), 1 + _below(rng, 4))
        statements = [
            self._say(rng, wording or _plain_or(rng, FACT_STATEMENTS), fact, "secret")
            for fact in facts
        ]
        questions = [
            self._say(rng, _plain_or(rng, FACT_QUESTIONS), fact, "answer") for fact in facts[:asked]
        ]
        while (
            sum(len(s.ids) for s in statements[: len(questions)] + questions) > self._room
            and len(questions) > 1
        ):
            questions.pop()
        kept = self._fitting(statements, questions, needed=len(questions))
        pairs = list(zip(kept, questions, strict=False))
        rng.shuffle(pairs)
        rng.shuffle(kept)
        ordered = list(kept)
        together = rng.random() < 0.5
        for statement, question in pairs:
            first = 1 + next(i for i, segment in enumerate(ordered) if segment is statement)
            place = len(ordered) if together else first + _below(rng, len(ordered) - first + 1)
            ordered.insert(place, question)
        return ordered

    @property
    def _room(self) -> int:
        return self.tokens - self.tokens // 16

    def _fitting(
        self, statements: list[_Segment], questions: list[_Segment], *, needed: int
    ) -> list[_Segment]:
        """Returns the first ``needed`` statements and as many of the others as leave some room for
        filler.
        """
        left = self._room - sum(len(segment.ids) for segment in questions + statements[:needed])
        kept = statements[:needed]
        for segment in statements[needed:]:
            if len(segment.ids) <= left:
                kept.append(segment)
                left -= len(segment.ids)
        return kept

    def _introduction(self, rng: random.Random, room: int) -> list[_Segment]:
        text = _pick(rng, wordings.INTRODUCTIONS) + _pick(rng, (" ", "\n", "\n\n"))
        if rng.random() >= INTRODUCTION_SHARE:
            return []
        ids = self.encoder.encode(text, continues=True).ids.tolist()
        return [_Segment(ids, [], [])] if len(ids) <= room else []

    def _say(self, rng: random.Random, wording: Parsed, fact: _Fact, role: str) -> _Segment:
        """Words a fact; its code's first mention is secret in a statement, the answer in a
        question.
        """
        before, after = _pick(rng, wordings.JOINTS)
        text = before
        begin = -1
        end = -1
        for literal, field in wording:
            text += literal
            if field == "value" and begin < 0:
                begin = len(text)
                end = len(text) + len(fact.value)
            text += getattr(fact, field) if field else ""
        encoded = self.encoder.encode(text + after, continues=True)
        code = [i for i, (a, b) in enumerate(encoded.spans.tolist()) if a < end and b > begin]
        return _Segment(
            encoded.ids.tolist(), code if role == "secret" else [], code if role == "answer" else []
        )

    def _spread(self, rng: random.Random, segments: list[_Segment]) -> list[_Segment]:
        """Puts filler before, between and after the segments; the last gap is often short."""
        budget = self.tokens - sum(len(segment.ids) for segment in segments)
        tail = min(budget, _below(rng, TAIL)) if rng.random() < 0.5 else _below(rng, budget + 1)
        cuts = sorted(_below(rng, budget - tail + 1) for _ in segments)
        filler = self._filler(rng, budget)
        laid = []
        position = 0
        for cut, segment in zip(cuts, segments, strict=True):
            laid += [_Segment(filler[position:cut], [], []), segment]
            position = cut
        return [*laid, _Segment(filler[position:], [], [])]

    def _window(self, rng: random.Random, tokens: int) -> npt.NDArray[np.int64]:
        start = _below(rng, len(self.ids) - tokens + 1)
        return self.ids[start : start + tokens].astype(np.int64)

    def _filler(self, rng: random.Random, tokens: int) -> list[int]:
        if rng.random() >= REPEATED_SHARE:
            text: list[int] = self._window(rng, tokens).tolist()
            return text
        window = self._window(rng, self.tokens)
        ends = np.flatnonzero(self.ends_sentence[window])
        first = _below(rng, max(1, len(ends) - 1))
        last = min(first + 1 + _below(rng, 5), len(ends) - 1)
        snippet = (
            window[ends[first] + 1 : ends[last] + 1]
            if last > first
            else window[: 8 + _below(rng, 32)]
        )
        repeated: list[int] = np.resize(snippet[: TAIL + TAIL // 2], tokens).tolist()
        return repeated

    def _quote(self, rng: random.Random) -> Row:
        opening = self.encoder.encode(
            _pick(rng, wordings.QUOTE_OPENINGS), continues=True
        ).ids.tolist()
        length = self.tokens // 32 + _below(rng, self.tokens // 8)
        filler = self._window(rng, self.tokens - len(opening) - length).tolist()
        tail = (
            min(_below(rng, TAIL), len(filler) - length)
            if rng.random() < 0.5
            else _below(rng, len(filler) - length)
        )
        place = len(filler) - tail
        start = _below(rng, place - length + 1)
        passage = filler[start : start + length]
        return self._row([_Segment([*filler[:place], *opening, *passage, *filler[place:]], [], [])])

    def _row(self, segments: list[_Segment]) -> Row:
        ids = list(self.prefix)
        secret = []
        answer = []
        for segment in segments:
            secret += [len(ids) + place for place in segment.secret]
            answer += [len(ids) + place for place in segment.answer]
            ids += segment.ids
        input_ids = np.array(ids, dtype=np.int64)
        labels = input_ids.copy()
        labels[[0, *secret]] = IGNORED
        answers = np.zeros(len(ids), dtype=np.bool_)
        answers[answer] = True
        assert len(ids) == self.tokens + len(self.prefix)
        return Row(input_ids, labels, answers)


def _sentence_ends(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    vocabulary = tokenizer.get_vocab()
    ends = np.zeros(1 + max(vocabulary.values()), dtype=np.bool_)  # ids may have holes
    for token, number in vocabulary.items():
        ends[number] = token.endswith((".", "!", "?"))
    return ends


def _below(rng: random.Random, bound: int) -> int:
    return int(rng.random() * bound)


def _pick(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def _plain_or(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[0] if rng.random() < PLAIN_SHARE else _pick(rng, items)


def _values(rng: random.Random, count: int) -> list[str]:
    """Returns different codes of three to seven digits, the first of them not 0."""
    values: list[str] = []
    while len(values) < count:
        digits = 3 + _below(rng, 5)
        value = str(10 ** (digits - 1) + _below(rng, 9 * 10 ** (digits - 1)))
        if value not in values:
            values.append(value)
    return values


def _names(rng: random.Random, count: int) -> list[str]:
    """Returns different names; in a third of the calls from so few words that many of them share
    one.
    """
    few = rng.random() < 1 / 3
    kinds = [_pick(rng, wordings.KINDS) for _ in range(3)] if few else wordings.KINDS
    things = [_pick(rng, wordings.THINGS) for _ in range(5)] if few else wordings.THINGS
    people = 0.0 if few else 0.2
    names: list[str] = []
    tries = 0
    while len(names) < count:
        tries += 1
        if tries > 20 * count:
            kinds = wordings.KINDS
            things = wordings.THINGS
        draw = rng.random()
        if draw < people:
            name = _pick(rng, wordings.PEOPLE)
            name = name if draw < people / 2 else f"{name}'s {_pick(rng, things)}"
        else:
            name = f"the {_pick(rng, kinds)} {_pick(rng, things)}"
        if name not in names:
            names.append(name)
    return names
