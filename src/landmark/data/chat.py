"""Conversations as text: rendered by a tokenizer's chat template, with what the assistant says.

A tokenizer without a chat template gets a plain form, ``Question: ...`` and ``Answer: ...``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from landmark.data.characters import without_surrogates
from landmark.data.errors import first_line
from landmark.data.tokenizer import encode

ASSISTANT = "assistant"
USER = "user"
SEPARATOR = "\n\n"  # between texts that a user gives, and before a question about them
MARK = "\u27ea\u27eb"  # stands for texts while a conversation is rendered
CONVERSATION = "conversation"  # its name in messages
PLAIN_NAMES = {"system": "", USER: "Question: ", ASSISTANT: "Answer: "}


class Message(NamedTuple):
    """A message of a conversation: who says it, and what."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatText:
    """A conversation as text.

    Attributes:
        text: its characters.
        answers: first character of each message of the assistant and the one after its last, the
            sign that ends it included.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def read_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Reads the list under ``messages`` of a row.

    Args:
        value: a list of objects with ``role`` and ``content``.
        where: names the row in messages.

    Raises:
        ValueError: anything else, or no message.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}: expected a list of messages, got {type(value).__name__}; write objects with "
            "role and content"
        )
    messages = []
    for number, message in enumerate(value, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"{where}: expected role and content, both strings, in message {number}, got "
                f"{_shown(message)}; write both"
            )
        messages.append(Message(role, without_surrogates(content)))
    return tuple(messages)


def render(tokenizer: Any, messages: Sequence[Message], where: str) -> ChatText:
    """Renders a conversation.

    What the assistant says is found by rendering the conversation up to each of its messages.

    Args:
        tokenizer: a tokenizer of transformers.
        messages: the conversation.
        where: names it in messages.

    Raises:
        ValueError: the chat template fails, or changes what it has rendered before when a message
            is added.
    """
    text = _rendered(tokenizer, messages, where, opens_answer=False)
    answers = []
    for index, message in enumerate(messages):
        if message.role != ASSISTANT:
            continue
        before = _rendered(tokenizer, messages[:index], where, opens_answer=True)
        behind = _rendered(tokenizer, messages[: index + 1], where, opens_answer=False)
        if not behind.startswith(before) or not text.startswith(behind.rstrip()):
            raise ValueError(
                f"{where}: expected a chat template that only adds text for message {index + 1}, "
                "got one that changes what stands before it; use another template "
                "(tokenizer.chat_template)"
            )
        end = len(behind.rstrip())
        if not has_template(tokenizer):
            end += 1  # the line end, which ends an answer in the plain form
        answers.append((len(before), end))
    return ChatText(text, tuple(answers))


def opening(tokenizer: Any) -> str:
    """Returns what stands before the texts that a user gives at the beginning of a conversation.

    Args:
        tokenizer: a tokenizer with a chat template.

    Raises:
        ValueError: the template fails, or changes what a user says.
    """
    return _around_mark(tokenizer, [Message(USER, MARK)])[0]


def closing(tokenizer: Any, question: str) -> str:
    """Returns what follows such texts when the user asks about them, up to where the answer begins.

    Args:
        tokenizer: as for ``opening``.
        question: the user's words.

    Raises:
        ValueError: as ``opening``.
    """
    return _around_mark(tokenizer, [Message(USER, MARK + SEPARATOR + question)])[1]


def first_turn(tokenizer: Any, question: str) -> str:
    """Returns a conversation that begins with a question, up to where the answer begins.

    Arguments and errors are those of ``closing``.
    """
    return prompt_of(tokenizer, [Message(USER, question)], CONVERSATION)


def prompt_of(tokenizer: Any, messages: Sequence[Message], where: str) -> str:
    """Returns a conversation up to where the assistant's next answer begins.

    Args:
        tokenizer: a tokenizer of transformers.
        messages: the conversation.
        where: names it in messages.

    Raises:
        ValueError: the chat template fails.
    """
    return _rendered(tokenizer, messages, where, opens_answer=True)


def chat_ends(tokenizer: Any, ends: int | Sequence[int] | None) -> list[int]:
    """Returns the tokens that end an answer in a conversation.

    Args:
        tokenizer: a tokenizer of transformers.
        ends: the end tokens of the model's generation config. To these come that of the tokenizer,
            and the sign by which the chat template ends an answer, if that is a special token.
    """
    found = {ends} if isinstance(ends, int) else set(ends or ())
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    sign = encode(tokenizer, next_turn(tokenizer, "-"), continues=True).ids[:1].tolist()
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(found | (set(sign) & special))


def next_turn(tokenizer: Any, question: str) -> str:
    """Returns what follows an answer when the user goes on asking, up to the next answer.

    It begins with the sign that ends the answer. Arguments and errors are those of ``closing``.
    """
    messages = [Message(USER, "-"), Message(ASSISTANT, MARK), Message(USER, question)]
    return _around_mark(tokenizer, messages)[1]


def _around_mark(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, str]:
    """Returns what a conversation has before the mark and behind it, up to the next answer."""
    return around(prompt_of(tokenizer, messages, CONVERSATION), MARK, CONVERSATION)


def around(text: str, mark: str, where: str) -> tuple[str, str]:
    """Returns what a conversation has before a mark and behind it.

    Args:
        text: the conversation, rendered with the mark as a part of what is said.
        mark: what stands there.
        where: names it in messages.

    Raises:
        ValueError: the chat template has changed what was said.
    """
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError(
            f"{where}: expected a chat template that keeps what is said, got one that changes it; "
            "use another template (tokenizer.chat_template)"
        )
    return before, after


def has_template(tokenizer: Any) -> bool:
    """Returns whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _rendered(
    tokenizer: Any, messages: Sequence[Message], where: str, *, opens_answer: bool
) -> str:
    """Returns a conversation as text, up to where an answer begins if ``opens_answer``."""
    if not has_template(tokenizer):
        return _plain(messages, opens_answer=opens_answer)
    try:
        text = tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            tokenize=False,
            add_generation_prompt=opens_answer,
        )
    except Exception as error:  # jinja2 and templates raise many kinds
        raise ValueError(
            f"{where}: expected messages that the tokenizer's chat template takes, got some that "
            f"it fails on ({first_line(error)}); mend them or the template"
        ) from None
    return str(text)


def _plain(messages: Sequence[Message], *, opens_answer: bool) -> str:
    text = "".join(
        f"{PLAIN_NAMES.get(message.role, message.role + ': ')}{message.content}\n"
        + ("\n" if message.role != USER else "")
        for message in messages
    )
    # Without the space, which belongs to the first token of the answer.
    return text + PLAIN_NAMES[ASSISTANT].rstrip() if opens_answer else text


def _shown(message: Any) -> str:
    """Returns what a message has instead of two strings."""
    if not isinstance(message, dict):
        return type(message).__name__
    kinds = {name: type(message[name]).__name__ for name in ("role", "content") if name in message}
    return ", ".join(f"{name} of type {kind}" for name, kind in kinds.items()) or "neither"
