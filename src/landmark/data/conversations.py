"""Rows of conversations: several in a row, which do not see each other, with loss on answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from landmark.data.chat import ASSISTANT, USER, Message, read_messages, render
from landmark.data.encoding import Progress
from landmark.data.episodes import IGNORED, Row
from landmark.data.kept_arrays import Arrays, kept_arrays
from landmark.data.rows import order_of
from landmark.data.text import read_rows
from landmark.data.tokenizer import encode, fingerprint

FORMAT = "landmark-conversations-1"


@dataclass(frozen=True)
class Conversation:
    """A conversation and the words that name it in messages."""

    where: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as tokens.

    Attributes:
        ids: ``(tokens,)`` int64.
        labels: ``(tokens,)`` int64, the ids of what the assistant says, -100 elsewhere.
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


def read_conversations(source: str | Path, *, split: str = "train") -> Iterator[Conversation]:
    """Reads conversations: rows with ``messages``, the hub's chat format, or with ``prompt``.

    Args:
        source: a ``.jsonl`` or ``.json`` file, or a data set of the hub. A row with ``prompt`` is
            what a user says; its ``completion``, if it has one, is what the assistant answers.
        split: which part of a data set to read.

    Raises:
        FileNotFoundError: there is no such file or data set.
        ModuleNotFoundError: a hub name without the package ``datasets``.
        ValueError: a row without messages, or with others than strings under role and content.
    """
    for row in read_rows(source, split=split):
        value = row.value if isinstance(row.value, dict) else {}
        messages = value.get("messages")
        if "prompt" in value:
            messages = [{"role": USER, "content": value["prompt"]}]
            if "completion" in value:
                messages.append({"role": ASSISTANT, "content": value["completion"]})
        yield Conversation(row.where, read_messages(messages, row.where))


def encode_conversations(
    conversations: Iterable[Conversation], tokenizer: Any, progress: Progress | None = None
) -> list[EncodedConversation]:
    """Encodes conversations by the tokenizer's chat template.

    Those without a message of the assistant are left out.

    Args:
        conversations: the conversations.
        tokenizer: a fast tokenizer of transformers.
        progress: called after each.

    Raises:
        ValueError: as ``landmark.data.chat.render``, or none is left.
    """
    found = []
    read = 0
    for conversation in conversations:
        read += 1
        rendered = render(tokenizer, conversation.messages, conversation.where)
        encoded = encode(tokenizer, rendered.text)
        labels = np.full(len(encoded.ids), IGNORED, dtype=np.int64)
        for begin, end in rendered.answers:
            said = encoded.tokens_of(begin, end)
            labels[said] = encoded.ids[said]
        if rendered.answers:
            found.append(EncodedConversation(encoded.ids, labels))
        if progress is not None:
            progress("conversations tokenised", read, 0)
    if not found:
        raise ValueError(
            f"messages: expected conversations in which an assistant says something, got {read} "
            "without; give other rows"
        )
    return found


def kept_conversations(
    path: Path, conversations: Sequence[Conversation], tokenizer: Any, progress: Progress | None
) -> list[EncodedConversation]:
    """Returns conversations as tokens from a file; encodes them if it has others.

    Args:
        path: the file.
        conversations, tokenizer, progress: as for ``encode_conversations``.

    Raises:
        ValueError: as ``encode_conversations``.
    """

    def make() -> Arrays:
        encoded = encode_conversations(conversations, tokenizer, progress)
        return {
            "ids": np.concatenate([each.ids for each in encoded]).astype(np.int32),
            "labels": np.concatenate([each.labels for each in encoded]).astype(np.int32),
            "lengths": np.array([len(each.ids) for each in encoded]),
        }

    template = str(getattr(tokenizer, "chat_template", None))
    parts = [FORMAT, fingerprint(tokenizer), template, digest_of(conversations)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    arrays = kept_arrays(path, key, make)
    ends = np.cumsum(arrays["lengths"])[:-1]
    ids = np.split(arrays["ids"].astype(np.int64), ends)
    labels = np.split(arrays["labels"].astype(np.int64), ends)
    return [EncodedConversation(*each) for each in zip(ids, labels, strict=True)]


class PackedConversations:
    """Fills rows with conversations.

    Every epoch has another order. A row takes conversations as long as they fit. What is left is
    filled with the beginning of the next one, which also begins the next row. A conversation that
    is longer than a row is cut.

    Args:
        conversations: the conversations.
        tokens: text tokens of a row.
        seed: decides the order.
    """

    def __init__(
        self, conversations: Sequence[EncodedConversation], *, tokens: int, seed: int
    ) -> None:
        self.conversations = conversations
        self.tokens = tokens
        self.seed = seed
        self._rows = lru_cache(maxsize=4)(self._packed)
        self._counts: list[int] = []  # rows of the epochs so far

    def __call__(self, number: int) -> Row:
        """Returns row ``number``."""
        epoch = 0
        while True:
            if epoch == len(self._counts):
                self._counts.append(len(self._rows(epoch)))
            if number < self._counts[epoch]:
                return self._row(self._rows(epoch)[number])
            number -= self._counts[epoch]
            epoch += 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = lru_cache(maxsize=4)(self._packed)

    def _packed(self, epoch: int) -> list[list[int]]:
        """Returns the conversations of each row of an epoch, the cut ones included."""
        order: list[int] = order_of(self.seed, epoch, len(self.conversations)).tolist()
        rows: list[list[int]] = []
        row: list[int] = []
        left = self.tokens
        for number in order:
            length = min(len(self.conversations[number].ids), self.tokens)
            if length > left:
                rows.append([*row, number])
                row = []
                left = self.tokens
            row.append(number)
            left -= length
        # The last row goes on with the conversations of the beginning.
        rows.append(row + order)
        return rows

    def _row(self, numbers: Sequence[int]) -> Row:
        """Joins conversations to a row, and cuts it at its full length."""
        ids: list[npt.NDArray[np.int64]] = []
        labels: list[npt.NDArray[np.int64]] = []
        documents: list[npt.NDArray[np.int64]] = []
        room = self.tokens
        while room > 0:
            for number in numbers:
                conversation = self.conversations[number]
                part = slice(0, room)
                ids.append(conversation.ids[part])
                first = conversation.labels[part].copy()
                first[0] = IGNORED  # nothing predicts it
                labels.append(first)
                documents.append(np.full(len(first), len(documents), dtype=np.int64))
                room -= len(first)
                if room == 0:
                    break
        joined = np.concatenate(ids)
        return Row(
            joined,
            np.concatenate(labels),
            np.zeros(len(joined), dtype=np.bool_),
            documents=np.concatenate(documents),
        )


def digest_of(conversations: Iterable[Conversation]) -> str:
    """Returns a SHA-256 of conversations."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(json.dumps(conversation.messages).encode())
    return digest.hexdigest()
