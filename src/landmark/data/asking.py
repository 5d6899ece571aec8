"""Rows in which a user gives texts and asks about them, and the assistant answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from landmark.data.chat import (
    ASSISTANT,
    MARK,
    SEPARATOR,
    USER,
    Message,
    around,
    has_template,
    prompt_of,
    render,
)
from landmark.data.episodes import IGNORED, Row, RowQuestion
from landmark.data.tokenizer import encode, row_start


class Turn(NamedTuple):
    """What a user asks, and what the assistant answers."""

    question: str
    answer: str


@dataclass(frozen=True)
class Frame:
    """What stands around the texts of a row.

    Attributes:
        before: the tokens before them.
        after: the questions and answers behind them.
        answers: the tokens of each answer, counted from the first of ``after``.
    """

    before: list[int]
    after: list[int]
    answers: list[range]

    def room(self, tokens: int) -> int:
        """Returns how many of a row's tokens are left for texts."""
        return tokens - len(self.before) - len(self.after)


def frame_of(tokenizer: Any, turns: Sequence[Turn], where: str) -> Frame:
    """Renders a conversation, and splits it where the texts stand.

    Args:
        tokenizer: a fast tokenizer of transformers. Without a chat template the conversation has
            the plain form of ``landmark.data.chat``.
        turns: the questions and answers. The texts stand before the first question.
        where: names the conversation in messages.

    Raises:
        ValueError: the chat template fails, or changes what a user says.
    """
    messages = []
    for number, turn in enumerate(turns):
        texts = MARK + SEPARATOR if number == 0 else ""
        messages.append(Message(USER, texts + turn.question))
        messages.append(Message(ASSISTANT, turn.answer))
    rendered = render(tokenizer, messages, where)
    before, after_text = _divided(tokenizer, rendered.text, MARK + SEPARATOR, where)
    last = rendered.answers[-1][1]
    shift = len(rendered.text) - len(after_text)
    after = encode(tokenizer, after_text[: last - shift], continues=True)
    answers = [after.tokens_of(begin - shift, end - shift) for begin, end in rendered.answers]
    return Frame(before, after.ids.tolist(), answers)


def prompt_frame(tokenizer: Any, question: str, *, has_texts: bool) -> Frame:
    """Returns what stands around texts when one question is asked, up to where the answer begins.

    Args:
        tokenizer: as for ``frame_of``.
        question: the question.
        has_texts: whether texts stand before it.

    Raises:
        ValueError: as ``frame_of``.
    """
    where = "question"
    texts = MARK + SEPARATOR if has_texts else MARK
    text = prompt_of(tokenizer, [Message(USER, texts + question)], where)
    before, after_text = _divided(tokenizer, text, texts, where)
    after = encode(tokenizer, after_text, continues=has_texts or len(before) > 0)
    return Frame(before, after.ids.tolist(), [])


def _divided(tokenizer: Any, text: str, texts: str, where: str) -> tuple[list[int], str]:
    """Divides a conversation where the texts stand.

    Args:
        tokenizer: as for ``frame_of``.
        text: the conversation.
        texts: what stands for the texts in it.
        where: names it in messages.

    Returns:
        the tokens before the texts, and what is said behind them.

    Raises:
        ValueError: the chat template has changed what a user says.
    """
    before, after = around(text, texts, where)
    if has_template(tokenizer):
        return encode(tokenizer, before).ids.tolist(), after
    # The texts come first; the plain form names the question behind them.
    return row_start(tokenizer), before + after


def asked_row(frame: Frame, texts: Sequence[int], evidence: Sequence[Sequence[range]]) -> Row:
    """Returns a row of texts and the questions about them; loss is taken on the answers alone.

    Args:
        frame: what stands around the texts.
        texts: their tokens.
        evidence: for each question, tokens of the texts that answer it.
    """
    ids = [*frame.before, *texts]
    begin = len(ids)
    ids += frame.after
    input_ids = np.array(ids, dtype=np.int64)
    labels = np.full(len(ids), IGNORED, dtype=np.int64)
    answers = np.zeros(len(ids), dtype=np.bool_)
    questions = []
    turn = begin
    for tokens, found in zip(frame.answers, evidence, strict=True):
        answer = range(begin + tokens.start, begin + tokens.stop)
        labels[answer] = input_ids[answer]
        answers[answer] = True
        shift = len(frame.before)
        mentions = [range(shift + span.start, shift + span.stop) for span in found]
        if mentions:
            mentions.sort(key=lambda span: span.start)
            questions.append(RowQuestion(range(turn, answer.stop), answer, tuple(mentions)))
        turn = answer.stop
    return Row(input_ids, labels, answers, tuple(questions))
