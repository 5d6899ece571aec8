"""``landmark chat``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from landmark.cli.answers import show_passages
from landmark.cli.ask import typed_lines
from landmark.cli.options import Device, Dtype, Model
from landmark.cli.output import note, say, say_error, say_part
from landmark.cli.progress import Shown
from landmark.config import GREATEST

if TYPE_CHECKING:
    from landmark.texts.explanation import Explanation

PASSAGES = "/passages"
QUIT = "/quit"
HELP = f"Ask about the texts; {PASSAGES} shows what was read for the last answer, {QUIT} ends."


def chat(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files or folders of .txt files to talk about."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(max=GREATEST, help="Most tokens of an answer.")
    ] = 256,
    retrieve: Annotated[
        bool, typer.Option("--retrieve", help="Prefill with retrieval, much slower.")
    ] = False,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk about FILES with a model that has a chat template, question by question.

    Answers appear as they are written. The conversation stays in the memory.
    """
    with Shown() as progress:
        from landmark.texts.chat import read_for_chat
        from landmark.texts.files import file_sources
        from landmark.texts.loading import load, quiet, require_landmark

        quiet()
        sources = file_sources(files, progress) if files else []
        loaded = load(model, device, dtype)
        require_landmark(loaded)
        talk = read_for_chat(loaded, sources, retrieve=retrieve, progress=progress)
    note(f"{len(talk.reading.ids):,} tokens read. {HELP}")
    last: Explanation | None = None
    for line in typed_lines():
        words = line.strip()
        if words == QUIT:
            return
        if words == PASSAGES:
            if last is not None:
                show_passages(last)
            continue
        try:
            last = talk.ask(words, max_new_tokens=max_new_tokens, stream=say_part)
        except ValueError as error:
            say_error(str(error))
            continue
        say("")
