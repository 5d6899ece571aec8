"""Synthetic retrieval episodes: rows in which something said earlier is asked for later.

There are three kinds: a *pass key* among named codes, *named facts* that must be told apart, and a
*passage quoted again*. The filler is taken from a corpus; in a fifth of the rows it is a short
snippet that is repeated. Facts begin at any token, so also across block borders. A code of which
one block holds the first digits and the next one the others is the hardest to find, and rare: a
share of the statements is placed so. A row follows from the seed and its index alone.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from string import Formatter
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from landmark.data import wordings
from landmark.data.encoding import TextEncoder
from landmark.data.tokens import Ids

IGNORED = -100  # label of a token without loss
# Probabilities of each kind of row; the other rows quote a passage.
KEY_SHARE = 0.25
FACTS_SHARE = 0.60
REPEATED_SHARE = 0.2  # of a filler that repeats a snippet
SHARED_NAMES_SHARE = 0.25  # of facts of which several have one name, and differ by their kind
ONE_KIND_SHARE = 0.7  # of the others: facts that all are codes of one kind
FEW_WORDS_SHARE = 1 / 3  # of names that are made of few words
INTRODUCTION_SHARE = 0.15  # of a sentence that announces the facts
PLAIN_SHARE = 0.3  # of the plainest wording
TRIES = 4  # draws of facts until they fit a row
SPACES = (" ", "Ġ", "▁")  # tokens that are a space and nothing else
SHORT_GAP = 64  # tokens; the filler behind the last segment is shorter in half of the rows
BORDER_SHARE = 0.25  # of statements that are moved so that a block ends inside their code

Item = TypeVar("Item")


class Part(NamedTuple):
    """A part of a wording: literal text, and the field that follows it (or the empty string)."""

    literal: str
    field: str


Wording = tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class RowQuestion:
    """A question of a row, and where its answer was said before.

    Attributes:
        tokens: the tokens of the question, its answer included.
        answer: the tokens of the answer. Each is predicted by the token before it.
        evidence: where the answer was said before: the tokens of each mention.
    """

    tokens: range
    answer: range
    evidence: tuple[range, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        input_ids: int64 ``(tokens,)``.
        labels: int64 ``(tokens,)``, the ids again, but -100 where no loss is taken: at the first
            token, which nothing predicts, and where a code is first mentioned.
        answers: bool ``(tokens,)``, the tokens of codes that are asked for, and of spaces before
            them.
        questions: the questions whose answers these are.
        documents: int64 ``(tokens,)``, the document of each token where several are packed in the
            row and do not see each other; ``None`` for one.
    """

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    answers: npt.NDArray[np.bool_]
    questions: tuple[RowQuestion, ...] = ()
    documents: npt.NDArray[np.int64] | None = None


@dataclasses.dataclass(frozen=True)
class _Fact:
    """A code.

    Attributes:
        label: the kind of code.
        name: what it belongs to.
        value: its digits.
    """

    label: str
    name: str
    value: str


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Tokens that stay together.

    Attributes:
        ids: token ids.
        fact: the fact that is stated or asked for, ``None`` in filler.
        asks: whether it is asked for.
        mentions: indices of the tokens of its code, for each time that it is mentioned.
    """

    ids: list[int]
    fact: _Fact | None = None
    asks: bool = False
    mentions: tuple[range, ...] = ()


def parse(wording: str) -> Wording:
    """Splits a wording into its parts."""
    return tuple(Part(literal, field or "") for literal, field, _, _ in Formatter().parse(wording))


KEY_STATEMENTS = tuple(map(parse, wordings.KEY_STATEMENTS))
KEY_QUESTIONS = tuple(map(parse, wordings.KEY_QUESTIONS))
FACT_STATEMENTS = tuple(map(parse, wordings.FACT_STATEMENTS))
FACT_QUESTIONS = tuple(map(parse, wordings.FACT_QUESTIONS))


class Episodes:
    """Makes episodes from a corpus.

    Args:
        tokenizer: the backend of a fast tokenizer.
        ids: the corpus, ``(tokens,)`` token ids.
        tokens: text tokens of a row, ``prefix`` included.
        seed: decides a row together with its index.
        block_tokens: text tokens of a block.
        prefix: ids that begin every row (``row_start``).
        facts: largest number of named facts in a row.
        questions: largest number of them that are asked for.
        distractors: largest number of named codes beside a pass key.

    Raises:
        ValueError: the corpus is shorter than a row, or a row has fewer than 128 tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: Ids,
        *,
        tokens: int,
        seed: int,
        block_tokens: int,
        prefix: Sequence[int] = (),
        facts: int = 8,
        questions: int = 4,
        distractors: int = 4,
    ) -> None:
        if len(ids) <= tokens:
            raise ValueError(
                f"expected a text of more than {tokens} tokens (one row), got {len(ids)}; add text"
            )
        if tokens < 2 * SHORT_GAP:
            raise ValueError(
                f"expected rows of at least {2 * SHORT_GAP} tokens for episodes, got {tokens}; "
                "lengthen the rows"
            )
        self.encoder = TextEncoder(tokenizer)
        self.spaces = {tokenizer.token_to_id(space) for space in SPACES} - {None}
        self.ids = ids
        self.seed = seed
        self.block_tokens = block_tokens
        self.prefix = list(prefix)
        self.facts = facts
        self.questions = questions
        self.distractors = distractors
        self.tokens = tokens - len(self.prefix)
        self.ends_sentence = sentence_ends(tokenizer)

    def __call__(self, index: int) -> Row:
        """Returns row ``index``; the same for the same seed, whatever was asked before."""
        rng = random.Random(f"{self.seed}:{index}")
        kind = rng.random()
        if kind >= KEY_SHARE + FACTS_SHARE:
            return self._quote(rng)
        for _ in range(TRIES):
            segments = self._key(rng) if kind < KEY_SHARE else self._facts(rng)
            taken = _length(segments)
            if taken <= self._room:
                introduction = self._introduction(rng, self._room - taken)
                return self._row(self._spread(rng, introduction + segments))
        return self._quote(rng)

    def _key(self, rng: random.Random) -> list[_Segment]:
        """Returns statements of a pass key and of named codes, and the question for the key."""
        label = _pick(rng, wordings.KEY_LABELS)
        values = _values(rng, 1 + _below(rng, self.distractors + 1))
        key = _Fact(label, "", values[0])
        statements = [self._say(rng, _plain_or(rng, KEY_STATEMENTS), key)]
        for name, value in zip(_names(rng, len(values) - 1), values[1:], strict=True):
            fact = _Fact(_pick(rng, wordings.FACT_LABELS), name, value)
            statements.append(self._say(rng, _plain_or(rng, FACT_STATEMENTS), fact))
        question = self._say(rng, _plain_or(rng, KEY_QUESTIONS), key, asks=True)
        kept = self._fitting(statements, [question], needed=1)
        rng.shuffle(kept)
        return [*kept, question]

    def _facts(self, rng: random.Random) -> list[_Segment]:
        """Returns statements of named codes, and questions for some, each behind its statement."""
        values = _values(rng, 1 + _below(rng, self.facts))
        facts = [
            _Fact(subject.label, subject.name, value)
            for subject, value in zip(_subjects(rng, len(values)), values, strict=True)
        ]
        wording = _plain_or(rng, FACT_STATEMENTS) if rng.random() < 0.7 else None
        asked = min(len(facts), 1 + _below(rng, self.questions))
        statements = [
            self._say(rng, wording or _plain_or(rng, FACT_STATEMENTS), fact) for fact in facts
        ]
        questions = [
            self._say(rng, _plain_or(rng, FACT_QUESTIONS), fact, asks=True)
            for fact in facts[:asked]
        ]
        while len(questions) > 1:
            if _length(statements[: len(questions)] + questions) <= self._room:
                break
            questions.pop()
        kept = self._fitting(statements, questions, needed=len(questions))
        pairs = list(zip(kept, questions, strict=False))
        rng.shuffle(pairs)
        rng.shuffle(kept)
        ordered = list(kept)
        together = rng.random() < 0.5
        for statement, question in pairs:
            if together:
                ordered.append(question)
                continue
            first = 1 + next(i for i, segment in enumerate(ordered) if segment is statement)
            ordered.insert(first + _below(rng, len(ordered) - first + 1), question)
        return ordered

    @property
    def _room(self) -> int:
        """Tokens of a row that are not reserved for filler."""
        return self.tokens - self.tokens // 16

    def _fitting(
        self, statements: list[_Segment], questions: list[_Segment], *, needed: int
    ) -> list[_Segment]:
        """Returns the first ``needed`` statements, and as many of the others as fit the row."""
        left = self._room - _length(questions + statements[:needed])
        kept = statements[:needed]
        for segment in statements[needed:]:
            if len(segment.ids) <= left:
                kept.append(segment)
                left -= len(segment.ids)
        return kept

    def _introduction(self, rng: random.Random, room: int) -> list[_Segment]:
        """Returns, in a share of the rows, a sentence that announces the facts."""
        text = _pick(rng, wordings.INTRODUCTIONS) + _pick(rng, (" ", "\n", "\n\n"))
        if rng.random() >= INTRODUCTION_SHARE:
            return []
        ids = self.encoder.encode(text, continues=True).ids.tolist()
        return [_Segment(ids)] if len(ids) <= room else []

    def _say(
        self, rng: random.Random, wording: Wording, fact: _Fact, *, asks: bool = False
    ) -> _Segment:
        """Words a fact as a statement, or as a question that holds its answer.

        Args:
            rng: the random numbers of the row.
            wording: the wording.
            fact: the fact.
            asks: whether it is asked for.
        """
        before, after = _pick(rng, wordings.JOINTS)
        text = before
        starts = []
        for literal, field in wording:
            text += literal
            if field == "value":
                starts.append(len(text))
            if field:
                text += getattr(fact, field)
        encoded = self.encoder.encode(text + after, continues=True)
        mentions = tuple(encoded.tokens_of(start, start + len(fact.value)) for start in starts)
        return _Segment(encoded.ids.tolist(), fact, asks, mentions)

    def _spread(self, rng: random.Random, segments: list[_Segment]) -> list[_Segment]:
        """Puts filler before, between and behind the segments; the last gap is often short."""
        budget = self.tokens - _length(segments)
        if rng.random() < 0.5:
            last_gap = min(budget, _below(rng, SHORT_GAP))
        else:
            last_gap = _below(rng, budget + 1)
        cuts = sorted(_below(rng, budget - last_gap + 1) for _ in segments)
        self._divide_codes(rng, segments, cuts, last=budget - last_gap)
        filler = self._filler(rng, budget)
        spread = []
        position = 0
        for cut, segment in zip(cuts, segments, strict=True):
            spread += [_Segment(filler[position:cut]), segment]
            position = cut
        return [*spread, _Segment(filler[position:])]

    def _divide_codes(
        self, rng: random.Random, segments: list[_Segment], cuts: list[int], *, last: int
    ) -> None:
        """Moves a share of the statements so that a block ends inside their code.

        One stays where it is if its neighbours leave no room to move.

        Args:
            rng: the random numbers of the row.
            segments: the segments.
            cuts: tokens of filler before each of them, rising; changed in place.
            last: the largest of them.
        """
        before = len(self.prefix)  # tokens of the row before a segment, filler not counted
        for number, segment in enumerate(segments):
            is_drawn = rng.random() < BORDER_SHARE
            code = segment.mentions[0] if segment.mentions else range(0)
            if is_drawn and not segment.asks and len(code) > 1:
                first_behind = code.start + 1 + _below(rng, len(code) - 1)
                up = -(before + cuts[number] + first_behind) % self.block_tokens
                lowest = cuts[number - 1] if number > 0 else 0
                highest = cuts[number + 1] if number + 1 < len(cuts) else last
                if cuts[number] + up <= highest:
                    cuts[number] += up
                elif cuts[number] + up - self.block_tokens >= lowest:
                    cuts[number] += up - self.block_tokens
            before += len(segment.ids)

    def _window(self, rng: random.Random, tokens: int) -> npt.NDArray[np.int64]:
        """Returns so many tokens from anywhere in the corpus."""
        start = _below(rng, len(self.ids) - tokens + 1)
        return self.ids[start : start + tokens].astype(np.int64)

    def _filler(self, rng: random.Random, tokens: int) -> list[int]:
        """Returns a part of the corpus, or a few sentences of it repeated."""
        if rng.random() >= REPEATED_SHARE:
            text: list[int] = self._window(rng, tokens).tolist()
            return text
        window = self._window(rng, self.tokens)
        ends = np.flatnonzero(self.ends_sentence[window])
        first = _below(rng, max(1, len(ends) - 1))
        last = min(first + 1 + _below(rng, 5), len(ends) - 1)
        if last > first:
            snippet = window[ends[first] + 1 : ends[last] + 1]
        else:
            snippet = window[: 8 + _below(rng, 32)]
        repeated: list[int] = np.resize(snippet[: SHORT_GAP + SHORT_GAP // 2], tokens).tolist()
        return repeated

    def _quote(self, rng: random.Random) -> Row:
        """Returns a row of filler in which a passage is quoted again."""
        opening_text = _pick(rng, wordings.QUOTE_OPENINGS)
        opening = self.encoder.encode(opening_text, continues=True).ids.tolist()
        length = self.tokens // 32 + _below(rng, self.tokens // 8)
        filler = self._window(rng, self.tokens - len(opening) - length).tolist()
        if rng.random() < 0.5:
            last_gap = min(_below(rng, SHORT_GAP), len(filler) - length)
        else:
            last_gap = _below(rng, len(filler) - length)
        quote_at = len(filler) - last_gap
        start = _below(rng, quote_at - length + 1)
        passage = filler[start : start + length]
        return self._row([_Segment([*filler[:quote_at], *opening, *passage, *filler[quote_at:]])])

    def _row(self, segments: list[_Segment]) -> Row:
        """Joins segments to a row of the full length."""
        ids = list(self.prefix)
        secret: list[int] = []
        answer: list[int] = []
        evidence: dict[_Fact, tuple[range, ...]] = {}
        questions = []
        for segment in segments:
            begin = len(ids)
            ids += segment.ids
            if segment.fact is None:
                continue
            mentions = tuple(_moved(mention, begin) for mention in segment.mentions)
            if segment.asks:
                code = mentions[0]
                # Asked, a model says the space before the code first, if that is a token.
                first = code.start - 1 if ids[code.start - 1] in self.spaces else code.start
                answer += range(first, code.stop)
                tokens = range(begin, code.stop)
                questions.append(RowQuestion(tokens, code, evidence[segment.fact]))
            else:
                secret += mentions[0]
                evidence[segment.fact] = mentions
        input_ids = np.array(ids, dtype=np.int64)
        labels = input_ids.copy()
        labels[[0, *secret]] = IGNORED
        answers = np.zeros(len(ids), dtype=np.bool_)
        answers[answer] = True
        assert len(ids) == self.tokens + len(self.prefix)
        return Row(input_ids, labels, answers, tuple(questions))


class _Subject(NamedTuple):
    """What a code is of: the kind of code, and the name of what it belongs to."""

    label: str
    name: str


def _moved(tokens: range, by: int) -> range:
    return range(tokens.start + by, tokens.stop + by)


def _length(segments: list[_Segment]) -> int:
    return sum(len(segment.ids) for segment in segments)


def sentence_ends(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """Returns whether each token ends a sentence, by id."""
    vocabulary = tokenizer.get_vocab()
    ends = np.zeros(1 + max(vocabulary.values()), dtype=np.bool_)  # some ids may have no token
    for token, number in vocabulary.items():
        ends[number] = token.endswith((".", "!", "?"))
    return ends


def _below(rng: random.Random, bound: int) -> int:
    return int(rng.random() * bound)


def _pick(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def _plain_or(rng: random.Random, items: Sequence[Item]) -> Item:
    """Returns the first item in a share of the draws, otherwise any."""
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


def _subjects(rng: random.Random, count: int) -> list[_Subject]:
    """Returns what ``count`` codes are of, all different.

    In a share of the calls several codes belong to one name, so that only their kinds tell them
    apart.
    """
    if rng.random() < SHARED_NAMES_SHARE:
        labels = _distinct_labels(rng, 3)
        names = _names(rng, 1 + count // 2)
        subjects = [_Subject(label, name) for name in names for label in labels]
        rng.shuffle(subjects)
        return subjects[:count]
    names = _names(rng, count)
    label = _pick(rng, wordings.FACT_LABELS)
    if rng.random() < ONE_KIND_SHARE:
        return [_Subject(label, name) for name in names]
    return [_Subject(_pick(rng, wordings.FACT_LABELS), name) for name in names]


def _distinct_labels(rng: random.Random, count: int) -> list[str]:
    """Returns kinds of codes of which none is a part of another, as "code" is of "lock code"."""
    labels: list[str] = []
    while len(labels) < count:
        label = _pick(rng, wordings.FACT_LABELS)
        if not any(label in other or other in label for other in labels):
            labels.append(label)
    return labels


def _names(rng: random.Random, count: int) -> list[str]:
    """Returns different names.

    In a share of the calls they are made of so few words that most names share one.
    """
    few = rng.random() < FEW_WORDS_SHARE
    # About twice as many names as are drawn.
    side = math.isqrt(2 * count)
    kinds = [_pick(rng, wordings.KINDS) for _ in range(max(3, side))] if few else wordings.KINDS
    things = [_pick(rng, wordings.THINGS) for _ in range(max(5, side))] if few else wordings.THINGS
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
            name = _person_or_theirs(rng, _pick(rng, things))
        else:
            name = f"the {_pick(rng, kinds)} {_pick(rng, things)}"
        if name not in names:
            names.append(name)
    return names


def _person_or_theirs(rng: random.Random, thing: str) -> str:
    """Returns a person, or something of theirs."""
    person = _pick(rng, wordings.PEOPLE)
    draw = rng.random()
    if draw < 0.4:
        return person
    if draw < 0.8:
        return f"{person}'s {thing}"
    return f"{person}'s {_pick(rng, wordings.KINDS)} {thing}"
