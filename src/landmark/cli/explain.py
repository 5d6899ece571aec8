"""``landmark explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.answers import show_answer
from landmark.cli.options import Device, Dtype, InChat, Model, NewTokens, text
from landmark.cli.output import say
from landmark.cli.progress import Shown


def explain(
    files: Annotated[
        list[Path],
        typer.Argument(help="Text files or folders of .txt files, read one after the other."),
    ],
    question: Annotated[
        str,
        typer.Option(
            callback=text,
            help="Question; without a chat template, text to go on from, which ends where the "
            "answer begins.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Path of the HTML page.")] = Path("out/explain.html"),
    max_new_tokens: NewTokens = None,
    chat: InChat = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Ask about FILES, and write an HTML page of what was read for each token of the answer."""
    with Shown() as progress:
        from landmark.data import outputs
        from landmark.texts.explain import explain_sources, uses_template
        from landmark.texts.files import file_sources
        from landmark.texts.loading import load, quiet, require_landmark

        quiet()
        outputs.require_writable(out, "out")
        sources = file_sources(files, progress)
        loaded = load(model, device, dtype)
        require_landmark(loaded)
        explanation = explain_sources(
            loaded.model,
            loaded.tokenizer,
            sources,
            question,
            max_new_tokens=max_new_tokens,
            chat=chat,
            progress=progress,
        )
    try:
        show_answer(explanation, in_chat=uses_template(loaded.tokenizer, chat))
    finally:  # wherever nobody takes the answer
        outputs.write(out, explanation.html().encode())
    say(f"Page: {out}")
