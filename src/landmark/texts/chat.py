"""A conversation about texts that a landmark model has read; its turns stay in the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from landmark.data.chat import closing, first_turn, next_turn, opening
from landmark.data.encoding import Progress
from landmark.data.sources import Reading, Source, read_sources
from landmark.hf.cache import LandmarkCache
from landmark.texts.explain import answered, asked_as, required_words, uses_template
from landmark.texts.explanation import Explanation
from landmark.texts.loading import LoadedModel
from landmark.texts.reading import read_reporting


class Chat:
    """A conversation: the user's texts, if any, then questions and answers in turns.

    Args:
        loaded: a landmark model whose tokenizer has a chat template.
        memory: has read the texts as the beginning of what the user says; the conversation is read
            into it. ``None`` for a new one.
        reading: these texts; ``None`` for none.

    Attributes:
        turns: questions that were answered.

    Raises:
        ValueError: a tokenizer without a chat template.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        memory: LandmarkCache | None = None,
        reading: Reading | None = None,
    ) -> None:
        uses_template(loaded.tokenizer, True)
        self.loaded = loaded
        self.memory = LandmarkCache(loaded.model.config) if memory is None else memory
        if reading is None:
            reading = Reading((), torch.zeros(0, dtype=torch.long), torch.zeros(0, 2))
        self.reading = reading
        self.turns = 0
        self._ids = reading.ids

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> Explanation:
        """Asks, and keeps question and answer for the turns that follow.

        Args:
            question: what the user says next.
            max_new_tokens: at most so many tokens are written; 256 by default.
            stream: gets the answer in parts, as they are written.

        Returns:
            the answer, with the passages that were read for it.

        Raises:
            ValueError: an empty question, or no new tokens. The conversation stays as it was.
        """
        tokenizer = self.loaded.tokenizer
        words = required_words(question, chat=True)
        if self.turns:
            said = next_turn(tokenizer, words)
        elif len(self.reading.ids):
            said = closing(tokenizer, words)
        else:
            said = first_turn(tokenizer, words)
        asked = asked_as(
            self.loaded.model,
            tokenizer,
            question,
            said,
            max_new_tokens,
            chat=True,
            continues=len(self._ids) > 0,
        )
        streamer = None if stream is None else _Stream(tokenizer, stream)
        answer, new = answered(
            self.loaded.model, tokenizer, self.memory, self.reading, self._ids, asked, streamer
        )
        self._ids = torch.cat((self._ids, new))
        self.turns += 1
        return answer


def read_for_chat(
    loaded: LoadedModel,
    sources: Sequence[Source],
    *,
    retrieve: bool = False,
    progress: Progress | None = None,
) -> Chat:
    """Reads texts as the beginning of what a user says, and begins a conversation about them.

    Args:
        loaded: a landmark model whose tokenizer has a chat template.
        sources: the texts, read one after the other; none for a conversation without texts.
        retrieve: whether to read with retrieval, which is much slower. Questions do not need it.
        progress: called while the texts are tokenised and read.

    Raises:
        ValueError: no chat template, or texts without tokens.
    """
    uses_template(loaded.tokenizer, True)
    if not sources:
        return Chat(loaded)
    begin = opening(loaded.tokenizer)
    reading = read_sources(sources, loaded.tokenizer, progress, opening=begin)
    ids = reading.ids[None].to(loaded.device)
    memory = read_reporting(loaded.model, ids, retrieve=retrieve, progress=progress)
    return Chat(loaded, memory, reading)


class _Stream(TextStreamer):  # type: ignore[misc]
    """Hands on the text of an answer in parts, each as soon as it is whole words."""

    def __init__(self, tokenizer: Any, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Takes a part of the answer."""
        if text:
            self.take(text)
