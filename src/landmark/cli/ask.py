"""``landmark ask``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.answers import show_answer
from landmark.cli.options import Device, Dtype, Model, NewTokens, SpillFolder, Tier, text
from landmark.cli.output import say_error
from landmark.cli.progress import Shown
from landmark.data.characters import from_arguments


def ask(
    memory: Annotated[Path, typer.Argument(help="Folder of a memory made by landmark remember.")],
    question: Annotated[
        str | None,
        typer.Argument(
            callback=text,
            help="Question; without a chat template, text to go on from, which ends where the "
            "answer begins.",
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Ask one question a line, until an empty line; with a chat template, in turns of "
            "one conversation.",
        ),
    ] = False,
    max_new_tokens: NewTokens = None,
    tier: Tier = "disk",
    spill_folder: SpillFolder = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Ask a MEMORY, and print the passages that were read below the answer.

    The memory stays as it is.
    """
    if (question is None) != interactive:
        found = "neither" if question is None else "both"
        raise ValueError(
            f"QUESTION: expected a question or --interactive, got {found}; ask one, or line by line"
        )
    with Shown() as progress:
        from landmark.texts.library import Library, model_of
        from landmark.texts.loading import load, quiet

        quiet()
        loaded = load(model or model_of(memory), device, dtype)
        progress("opening the memory")
        library = Library.open(memory, loaded, tier, spill_folder=spill_folder)
        asked = library.chat() if interactive and library.is_chat else library
    for each in typed_lines() if question is None else [question]:
        with Shown() as progress:
            progress("answering")
            try:
                answer = asked.ask(each, max_new_tokens=max_new_tokens)
            except ValueError as error:
                if not interactive:
                    raise
                progress.rest()
                say_error(str(error))
                continue
        show_answer(answer, in_chat=library.is_chat)


def typed_lines() -> Iterator[str]:
    """Yields what is typed, line by line, until an empty line or the end."""
    while sys.stdin is not None:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        line = from_arguments(sys.stdin.readline().rstrip("\r\n"))
        if not line:
            return
        yield line
