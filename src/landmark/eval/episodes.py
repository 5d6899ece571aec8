"""Documents with facts at random places of a filler, and questions about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landmark.data.encoding import Encoded
from landmark.data.tokenizer import encode, row_start
from landmark.eval.fillers import Filler

BUCKETS = 10
_NAMES = (
    "north south east west old new red blue green white black upper lower inner outer great",
    "gate tower bridge harbour garden library chapel mill stable cellar market school lodge barn "
    "quay forge",
)


@dataclass(frozen=True)
class Fact:
    """A sentence that is dropped into a document, and how it is asked for.

    Attributes:
        statement: the sentence, or sentences.
        question: ends where the answer begins.
        answer: begins with a space.
    """

    statement: str
    question: str
    answer: str


def pass_key(rng: random.Random) -> Fact:
    """Returns a pass key of five digits in the paper's wording."""
    key = rng.randrange(10000, 100000)
    return Fact(
        f" The pass key is {key}. Remember it. {key} is the pass key. ",
        " What is the pass key? The pass key is",
        f" {key}",
    )


def named_codes(rng: random.Random, count: int, digits: int = 4) -> list[Fact]:
    """Returns ``count`` codes of different places, all codes different.

    Raises:
        ValueError: more than there are names.
    """
    qualities, things = (words.split() for words in _NAMES)
    names = [f"{quality} {thing}" for quality in qualities for thing in things]
    if count > len(names):
        raise ValueError(
            f"named codes: expected at most {len(names)} in one document, got {count}; ask for "
            "fewer"
        )
    codes = rng.sample(range(10 ** (digits - 1), 10**digits), count)
    return [
        Fact(
            f" The code of the {name} is {code}. ",
            f" What is the code of the {name}? The code of the {name} is",
            f" {code}",
        )
        for name, code in zip(rng.sample(names, count), codes, strict=True)
    ]


@dataclass(frozen=True)
class Question:
    """Token ids of a question with its answer: the last ``answered`` of ``ids`` are the answer."""

    ids: list[int]
    answered: int


@dataclass(frozen=True)
class Episode:
    """One document and its questions.

    Attributes:
        document: ``(length,)`` int64.
        questions: one for each fact asked for.
        places: token indices of the statement of each of these facts.
        evidence: token indices of each mention of the answer in that statement.
    """

    document: Tensor
    questions: tuple[Question, ...]
    places: tuple[range, ...]
    evidence: tuple[tuple[range, ...], ...]


def build_episode(
    rng: random.Random,
    tokenizer: Any,
    filler: Filler,
    length: int,
    facts: Sequence[Fact],
    distractors: Sequence[Fact] = (),
    bucket: int | None = None,
) -> Episode:
    """Builds a document of exactly ``length`` text tokens.

    Args:
        rng: decides the places and, but for the paper's sentence, where the filler starts.
        tokenizer: of transformers, a fast one.
        filler: what stands between the facts.
        length: text tokens, those that the tokenizer begins every text with included.
        facts: asked for.
        distractors: placed like facts, not asked for.
        bucket: which tenth of the document the first fact begins in; anywhere for ``None``.

    Raises:
        ValueError: the facts do not fit, or a slow tokenizer.
    """
    start_ids = row_start(tokenizer)
    encoded = [encode(tokenizer, fact.statement, continues=True) for fact in (*facts, *distractors)]
    statements = [statement.ids.tolist() for statement in encoded]
    room = length - len(start_ids) - sum(map(len, statements))
    if room < 0:
        raise ValueError(
            f"lengths: expected at least {length - room} text tokens for {len(statements)} "
            f"facts, got {length}; pass greater lengths or fewer facts"
        )
    cuts = [rng.randint(0, room) for _ in statements]
    if bucket is not None:
        cuts[0] = min(room, int((bucket + rng.random()) / BUCKETS * (room + 1)))
    order = sorted(range(len(statements)), key=lambda index: cuts[index])
    stream = filler.take(0 if filler.name == "paper" else rng.randrange(len(filler.ids)), room)
    parts = [torch.tensor(start_ids, dtype=torch.long)]
    places = {}
    done = 0
    at = len(start_ids)
    for index in order:
        parts += [stream[done : cuts[index]], torch.tensor(statements[index], dtype=torch.long)]
        places[index] = range(at + cuts[index], at + cuts[index] + len(statements[index]))
        at += len(statements[index])
        done = cuts[index]
    parts.append(stream[done:])
    return Episode(
        document=torch.cat(parts),
        questions=tuple(_question(tokenizer, fact) for fact in facts),
        places=tuple(places[index] for index in range(len(facts))),
        evidence=tuple(
            _mentions(fact, statement, places[index].start)
            for index, (fact, statement) in enumerate(zip(facts, encoded, strict=False))
        ),
    )


def _mentions(fact: Fact, statement: Encoded, start: int) -> tuple[range, ...]:
    """Returns the tokens of each mention of an answer in its statement.

    Args:
        fact: the fact.
        statement: its encoded statement.
        start: token index of the statement in the document.
    """
    answer = fact.answer.strip()
    found = []
    at = fact.statement.find(answer)
    while at >= 0:
        tokens = statement.tokens_of(at, at + len(answer))
        found.append(range(start + tokens.start, start + tokens.stop))
        at = fact.statement.find(answer, at + len(answer))
    return tuple(found)


def bucket_of(place: int, length: int) -> int:
    """Returns which tenth of a document of ``length`` tokens the token index ``place`` lies in."""
    return min(BUCKETS - 1, place * BUCKETS // length)


def _question(tokenizer: Any, fact: Fact) -> Question:
    """Splits the ids of question and answer where they part from those of the question alone."""
    whole = _encode(tokenizer, fact.question + fact.answer)
    alone = _encode(tokenizer, fact.question)
    same = 0
    while same < min(len(whole), len(alone)) and whole[same] == alone[same]:
        same += 1
    return Question(whole, len(whole) - same)


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a text that goes on from another one."""
    ids: list[int] = encode(tokenizer, text, continues=True).ids.tolist()
    return ids
