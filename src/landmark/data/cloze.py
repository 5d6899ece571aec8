"""Inverse cloze: questions that any text asks about itself.

A sentence is taken out of a text, and some of the words that it shares with the text around it are
left out. The user gives the text, asks for the place by what is left of the sentence, and the
assistant quotes the sentence that followed it there. The place has to be found by what it is about,
not by its words.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from landmark.data.asking import Frame, Turn, asked_row, frame_of
from landmark.data.episodes import Row, sentence_ends
from landmark.data.tokenizer import backend
from landmark.data.tokens import Ids

TAKEN_OUT_SHARE = 0.9  # of questions whose sentence is taken out of the text
SHORTEST = 8  # tokens of a sentence that is asked for, or quoted
LONGEST = 64
AROUND = 128  # tokens before and behind a sentence whose words it shares
KEPT_WORDS = 4  # of a sentence, at least
SAMPLE = 1 << 18  # tokens that say how rare a word is
TRIES = 50  # places that are tried for a question
WORD = re.compile(r"\w+")
QUESTIONS = (
    "Quote the sentence that follows where the text is about this: {words}",
    "What comes next in the text after: {words}",
    'Somewhere the text says something like "{words}". Which sentence comes after it?',
    "Find the passage about {words} and quote its next sentence.",
    "{words} - what is said right after that?",
)


class _Place(NamedTuple):
    """Two sentences of a text: the one that is asked for, and the one behind it, as tokens."""

    asked: range
    quoted: range


class Cloze:
    """Makes rows of inverse cloze from a corpus.

    Args:
        tokenizer: a fast tokenizer of transformers; ``landmark.data.asking.frame_of`` says how a
            conversation is written.
        ids: the corpus, ``(tokens,)`` token ids.
        tokens: text tokens of a row.
        seed: decides a row together with its number.
        questions: largest number of questions in a row.

    Raises:
        ValueError: the corpus is shorter than two rows.
    """

    def __init__(
        self, tokenizer: Any, ids: Ids, *, tokens: int, seed: int, questions: int = 4
    ) -> None:
        if len(ids) < 2 * tokens:
            raise ValueError(
                f"expected a text of at least {2 * tokens} tokens (two rows), got {len(ids)}; add "
                "text"
            )
        self.tokenizer = tokenizer
        self.ids = ids
        self.tokens = tokens
        self.seed = seed
        self.questions = questions
        self.ends_sentence = sentence_ends(backend(tokenizer))
        sample: str = tokenizer.decode(ids[:SAMPLE].astype(np.int64).tolist())
        self._frequency = Counter(WORD.findall(sample.lower()))

    def __call__(self, number: int) -> Row:
        """Returns row ``number``; the same for the same seed.

        Raises:
            ValueError: a text without sentences.
        """
        rng = random.Random(f"{self.seed}:{number}")
        count = rng.randint(1, self.questions)
        for _ in range(TRIES):
            # Twice a row: what is taken out is replaced by the text behind it.
            start = rng.randrange(len(self.ids) - 2 * self.tokens + 1)
            window = self.ids[start : start + 2 * self.tokens].astype(np.int64)
            places = self._places(rng, window, count)
            turns = [self._turn(rng, window, place) for place in places]
            while turns:
                frame = frame_of(self.tokenizer, turns, "inverse cloze")
                room = frame.room(self.tokens)
                if room > 0 and all(place.quoted.stop <= room for place in places):
                    break
                turns.pop()
                places.pop()
            if turns:
                taken_out = [place.asked for place in places if rng.random() < TAKEN_OUT_SHARE]
                return self._row(frame, window, places, taken_out, room)
        raise ValueError(
            f"cloze: expected a text with sentences of {SHORTEST} to {LONGEST} tokens, got none in "
            f"{TRIES} places of {2 * self.tokens} tokens; leave cloze out"
        )

    def _places(self, rng: random.Random, window: Any, count: int) -> list[_Place]:
        """Returns up to ``count`` pairs of sentences, none of which share a sentence."""
        ends = np.flatnonzero(self.ends_sentence[window[: self.tokens]]) + 1
        pairs = [
            _Place(range(int(first), int(middle)), range(int(middle), int(last)))
            for first, middle, last in zip(ends, ends[1:], ends[2:], strict=False)
            if SHORTEST <= middle - first <= LONGEST and SHORTEST <= last - middle <= LONGEST
        ]
        rng.shuffle(pairs)
        chosen: list[_Place] = []
        for pair in pairs:
            is_apart = all(
                pair.quoted.stop <= other.asked.start or other.quoted.stop <= pair.asked.start
                for other in chosen
            )
            if is_apart and len(chosen) < count:
                chosen.append(pair)
        return chosen

    def _turn(self, rng: random.Random, window: Any, place: _Place) -> Turn:
        """Returns the question for a place, and the sentence that is quoted."""
        sentence = self._text(window, place.asked)
        before = range(max(0, place.asked.start - AROUND), place.asked.start)
        behind = range(place.asked.stop, place.asked.stop + AROUND)
        around = f"{self._text(window, before)} {self._text(window, behind)}"
        words = self._without_shared(sentence, set(WORD.findall(around.lower())))
        question = rng.choice(QUESTIONS).format(words=" ".join(words.split()))
        return Turn(question, " ".join(self._text(window, place.quoted).split()))

    def _without_shared(self, sentence: str, around: set[str]) -> str:
        """Returns a sentence without the rarer half of the words that stand around it too."""
        words = WORD.findall(sentence)
        shared = sorted(
            {word.lower() for word in words} & around,
            key=lambda word: (self._frequency[word], word),
        )
        left_out: set[str] = set()
        for word in shared[: (len(shared) + 1) // 2]:
            kept = [each for each in words if each.lower() not in left_out | {word}]
            if len(kept) < KEPT_WORDS:
                break
            left_out.add(word)
        return WORD.sub(
            lambda found: "" if found[0].lower() in left_out else found[0], sentence
        ).strip()

    def _row(
        self,
        frame: Frame,
        window: Any,
        places: Sequence[_Place],
        taken_out: Sequence[range],
        room: int,
    ) -> Row:
        """Returns the row of a window without the sentences that are taken out."""
        keep = np.ones(len(window), dtype=np.bool_)
        for tokens in taken_out:
            keep[tokens] = False
        before = np.concatenate(([0], np.cumsum(keep)))  # kept tokens before each token
        evidence = [
            [range(int(before[place.quoted.start]), int(before[place.quoted.stop]))]
            for place in places
        ]
        return asked_row(frame, window[keep][:room].tolist(), evidence)

    def _text(self, window: Any, tokens: range) -> str:
        text: str = self.tokenizer.decode(
            window[tokens.start : tokens.stop].tolist(), skip_special_tokens=True
        )
        return text
