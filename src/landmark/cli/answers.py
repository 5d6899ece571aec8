"""An answer and the passages that were read for it, as lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from landmark.cli.output import say, say_text

if TYPE_CHECKING:
    from landmark.texts.explanation import Explanation

CHARACTERS = 240  # shown of a passage


def show_answer(explanation: Explanation, *, in_chat: bool = False) -> None:
    """Prints a question with its answer, and below it the passages that were read.

    Args:
        explanation: the answer.
        in_chat: whether it is an answer to a question, and not what goes on from it.
    """
    between = "\n" if in_chat else ""
    say_text(f"{explanation.question.strip()}{between}{explanation.answer.rstrip()}")
    show_passages(explanation)


def show_passages(explanation: Explanation) -> None:
    """Prints the passages that were read for an answer.

    Of each passage: its share of the attention, its file and line, and its text.
    """
    for passage in explanation.passages():
        text = " ".join(passage.text.split())
        cut = text if len(text) <= CHARACTERS else text[:CHARACTERS] + " ..."
        say(f"  {passage.weight:>5.1%}  {passage.source}:{passage.line}  {cut}")
