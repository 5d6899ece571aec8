"""Ask a memory, and say which text was read for each token of the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landmark.blocks import slot_of
from landmark.data.characters import without_surrogates
from landmark.data.chat import chat_ends, closing, has_template, opening
from landmark.data.encoding import Progress
from landmark.data.sources import Reading, Source, read_sources
from landmark.data.tokenizer import continuation, encode
from landmark.hf.cache import LandmarkCache
from landmark.memory.retrieval import Retrieval
from landmark.texts.explanation import Explanation, Step
from landmark.texts.passages import Span
from landmark.texts.reading import read_reporting

MAX_NEW_TOKENS = 16
CHAT_NEW_TOKENS = 256  # of an answer in a conversation, which ends by itself


@dataclass(frozen=True)
class Asked:
    """A question as it is asked.

    Attributes:
        text: as it was given.
        ids: ``(n,)`` its tokens, which go on from what was read before.
        max_new_tokens: at most so many tokens are written.
        ends: tokens that end an answer; ``None`` for those of the model's generation config.
    """

    text: str
    ids: Tensor
    max_new_tokens: int
    ends: list[int] | None = None


def explain(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[tuple[str, str]],
    question: str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Explanation:
    """Reads a text, asks a question, and says what was read for each token of the answer.

    The text is read without retrieval, the question with it. Where the tokenizer has a chat
    template, text and question are what a user says, and the answer what the assistant does.

    Args:
        model: a landmark model.
        tokenizer: its tokenizer, a fast one.
        text: of any length; or several, as ``(name, text)``, read one after the other.
        question: a question about it; without a chat template what the model goes on from, as it
            stands, which ends where the answer begins.
        max_new_tokens: at most so many tokens are written, the most probable ones.

    Raises:
        ValueError: a plain model, no text, an empty question, no new tokens, a slow tokenizer, or a
            chat template that fails.
    """
    if not hasattr(model, "landmark"):
        raise ValueError(
            f"model: expected a landmark model, got {type(model).__name__}; use landmark.convert"
        )
    named = [("text", text)] if isinstance(text, str) else text
    sources = [
        Source(without_surrogates(name), without_surrogates(characters))
        for name, characters in named
    ]
    return explain_sources(model, tokenizer, sources, question, max_new_tokens=max_new_tokens)


def explain_sources(
    model: Any,
    tokenizer: Any,
    sources: Sequence[Source],
    question: str,
    *,
    max_new_tokens: int | None = None,
    chat: bool | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Does what ``explain`` does for named texts.

    Args:
        model: a landmark model.
        tokenizer: its tokenizer, a fast one.
        sources: read one after the other.
        question: see ``explain``.
        max_new_tokens: see ``explain``; ``None`` for 16, or 256 in a conversation.
        chat: whether to use the chat template; ``None`` for yes where there is one.
        progress: called while the texts are tokenised and read.

    Raises:
        ValueError: as ``explain``.
    """
    in_chat = uses_template(tokenizer, chat)
    asked = question_behind_text(model, tokenizer, question, max_new_tokens, chat=in_chat)
    begin = opening(tokenizer) if in_chat else None
    reading = read_sources(sources, tokenizer, progress, opening=begin)
    cache = read_reporting(
        model, reading.ids[None].to(model.device), retrieve=False, progress=progress
    )
    if progress is not None:
        progress("answering", 0, 0)
    return answered(model, tokenizer, cache, reading, reading.ids, asked)[0]


def explain_memory(
    model: Any,
    tokenizer: Any,
    memory: LandmarkCache,
    reading: Reading,
    question: str,
    *,
    max_new_tokens: int | None = None,
    chat: bool = False,
) -> Explanation:
    """Does what ``explain`` does for texts that were read before.

    The question runs on a fork of the memory, which stays as it is.

    Args:
        model: a landmark model.
        tokenizer: its tokenizer.
        memory: of one row, without padding.
        reading: what it has read.
        question: see ``explain``.
        max_new_tokens: see ``explain_sources``.
        chat: whether the texts were read as what a user says.

    Raises:
        ValueError: a memory of other text, or of several rows; else as ``explain``.
    """
    length = len(reading.ids)
    if memory.tokens != [length] or memory.get_seq_length() != length:
        raise ValueError(
            f"memory: expected one row of the {length} text tokens of the reading, without "
            f"padding, got rows of {memory.tokens} in {memory.get_seq_length()} columns; pass "
            "what was read into it, and nothing more"
        )
    asked = question_behind_text(model, tokenizer, question, max_new_tokens, chat=chat)
    return answered(model, tokenizer, memory.fork(), reading, reading.ids, asked)[0]


def uses_template(tokenizer: Any, chat: bool | None) -> bool:
    """Returns whether texts and questions are put into the tokenizer's chat template.

    Args:
        tokenizer: of transformers.
        chat: what is asked for; ``None`` for yes where there is a template.

    Raises:
        ValueError: a template is asked for, and there is none.
    """
    if chat and not has_template(tokenizer):
        raise ValueError(
            "chat: expected a model whose tokenizer has a chat template, got one without; use an "
            "instruct model"
        )
    return has_template(tokenizer) if chat is None else chat


def question_behind_text(
    model: Any, tokenizer: Any, question: str, max_new_tokens: int | None, *, chat: bool
) -> Asked:
    """Returns a question about texts that were read before it; raises as ``asked_as``."""
    words = required_words(question, chat=chat)
    said = closing(tokenizer, words) if chat else words
    return asked_as(model, tokenizer, question, said, max_new_tokens, chat=chat)


def required_words(question: str, *, chat: bool) -> str:
    """Returns the words of a question, in a conversation without the space around them.

    Raises:
        ValueError: there are none.
    """
    words = without_surrogates(question.strip() if chat else question)
    if not words:
        raise ValueError("question: expected at least one token, got an empty text; ask something")
    return words


def asked_as(
    model: Any,
    tokenizer: Any,
    question: str,
    said: str,
    max_new_tokens: int | None,
    *,
    chat: bool,
    continues: bool = True,
) -> Asked:
    """Checks what is asked for, before anything is read.

    Args:
        model: the landmark model.
        tokenizer: its tokenizer.
        question: the question as it was given.
        said: the text that asks it, up to where the answer begins.
        max_new_tokens: see ``explain_sources``.
        chat: whether it is a turn of a conversation.
        continues: whether text was read before it.

    Raises:
        ValueError: a text without tokens, or no new tokens.
    """
    if max_new_tokens is None:
        max_new_tokens = CHAT_NEW_TOKENS if chat else MAX_NEW_TOKENS
    if max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens: expected at least 1, got {max_new_tokens}; pass for example "
            f"{MAX_NEW_TOKENS}"
        )
    ids = torch.from_numpy(encode(tokenizer, said, continues=continues).ids)
    if len(ids) == 0:
        raise ValueError("question: expected at least one token, got an empty text; ask something")
    ends = chat_ends(tokenizer, model.generation_config.eos_token_id) if chat else None
    return Asked(question, ids, max_new_tokens, ends)


def answered(
    model: Any,
    tokenizer: Any,
    cache: LandmarkCache,
    reading: Reading,
    before: Tensor,
    asked: Asked,
    streamer: Any = None,
) -> tuple[Explanation, Tensor]:
    """Writes the answer behind what the cache has read, and explains each of its tokens.

    Args:
        model: the landmark model.
        tokenizer: its tokenizer.
        cache: has read all or a part of ``before``.
        reading: the texts at the beginning of it.
        before: ``(n,)`` all tokens before the question.
        asked: the question.
        streamer: a streamer of transformers, which gets tokens as they are written.

    Returns:
        the answer, and the tokens of question and answer without the one that ended it.
    """
    cache.record = True
    cache.retrievals = []
    ids = torch.cat((before, asked.ids))[None].to(model.device)
    ends = {} if asked.ends is None else {"eos_token_id": asked.ends, "pad_token_id": asked.ends[0]}
    with torch.no_grad():
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=asked.max_new_tokens,
            do_sample=False,
            streamer=streamer,
            **ends,
        )
    stops = model.generation_config.eos_token_id if asked.ends is None else asked.ends
    written = _without_end(whole[0, ids.shape[1] :].tolist(), stops)
    texts = list(token_texts(tokenizer, written, asked.ids.tolist()))
    size = model.landmark.block_size
    slots = [slot_of(ids.shape[1] - 1 + index, size) for index in range(len(written))]
    shares = block_shares(cache.retrievals, slots)
    steps = (
        Step(text, spans_of(share, reading, size - 1))
        for text, share in zip(texts, shares, strict=True)
    )
    explanation = Explanation(reading.sources, asked.text, "".join(texts), tuple(steps))
    return explanation, torch.cat((asked.ids, torch.tensor(written, dtype=torch.long)))


def block_shares(retrievals: Iterable[Retrieval], slots: Sequence[int]) -> list[dict[int, float]]:
    """Returns the share of the attention that each retrieved block got from some queries.

    Args:
        retrievals: what a cache of one row recorded.
        slots: of the queries; the token after a query is what it gave.

    Returns:
        for each slot the blocks, by index, and the mean of their gate weights over layers and heads
        (layers that retrieve nothing are counted).
    """
    index = {slot: number for number, slot in enumerate(slots)}
    sums: list[dict[int, float]] = [{} for _ in slots]
    readers = [0] * len(slots)
    for retrieval in retrievals:
        for column, slot in enumerate(retrieval.positions[0].tolist()):
            if slot in index:
                number = index[slot]
                readers[number] += retrieval.blocks.shape[1]
                _add(sums[number], retrieval.blocks[0, :, column], retrieval.weights[0, :, column])
    return [
        {block: total / count for block, total in of.items()}
        for of, count in zip(sums, readers, strict=True)
    ]


def _add(sums: dict[int, float], blocks: Tensor, weights: Tensor) -> None:
    """Adds the weights of blocks, -1 for none, to what each block has."""
    found, inverse = torch.unique(blocks, return_inverse=True)
    totals = torch.zeros(len(found), dtype=torch.float64)
    totals.index_add_(0, inverse.flatten(), weights.flatten().double())
    for block, total in zip(found.tolist(), totals.tolist(), strict=True):
        if block >= 0:
            sums[block] = sums.get(block, 0.0) + total


def spans_of(shares: dict[int, float], reading: Reading, text_per_block: int) -> tuple[Span, ...]:
    """Returns the blocks that hold text of the sources, by block, with their characters."""
    spans = (
        Span(block, *reading.of_block(block, text_per_block), shares[block])
        for block in sorted(shares)
    )
    return tuple(span for span in spans if span.begin < span.end)


def token_texts(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> Iterator[str]:
    """Yields the text of each token; joined, they are what ``continuation`` returns.

    A token whose bytes make a character only with those of the next has none, the last of them has
    the character.
    """
    done = 0
    for end in range(1, len(ids) + 1):
        text = continuation(tokenizer, ids[:end], before)
        if text.endswith("\ufffd") and end < len(ids):
            yield ""
        else:
            yield text[done:]
            done = len(text)


def _without_end(ids: list[int], end: int | list[int] | None) -> list[int]:
    """Returns ids without the end token that they end with; there may be several kinds of it."""
    ends = [end] if isinstance(end, int) else end
    if ids and ends and ids[-1] in ends:
        return ids[:-1]
    return ids
