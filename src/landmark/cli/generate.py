"""``landmark generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, InChat, Model, Seed, text
from landmark.cli.output import say_text
from landmark.cli.progress import Shown
from landmark.config import GREATEST


def generate(
    prompt: Annotated[str, typer.Argument(callback=text, help="Text to go on from, or to answer.")],
    model: Model = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            max=GREATEST, help="Most tokens to write. By default 64, 256 with a chat template."
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Text file of any length to read before the prompt.")
    ] = None,
    read: Annotated[
        str,
        typer.Option(help="How to prefill the file: local (local attention only) or retrieve."),
    ] = "local",
    temperature: Annotated[
        float, typer.Option(help="Temperature of sampling; 0 takes the most probable token.")
    ] = 0.0,
    seed: Seed = 0,
    chat: InChat = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Write on from PROMPT, or answer it, after reading a text of any length with --file."""
    with Shown() as progress:
        from landmark.texts.generate import continue_text
        from landmark.texts.loading import load, quiet

        quiet()
        written = continue_text(
            load(model, device, dtype),
            prompt,
            file=file,
            read=read,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            progress=progress,
        )
    say_text(written)
