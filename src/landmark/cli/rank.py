"""``landmark rank``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, InChat, Model, text
from landmark.cli.progress import Shown


def rank(
    query: Annotated[str, typer.Argument(callback=text, help="Text to look for.")],
    files: Annotated[
        list[Path], typer.Argument(help="Text files, or .jsonl files with a document in each row.")
    ],
    model: Model = None,
    top: Annotated[int, typer.Option(help="Documents to show.")] = 10,
    chat: InChat = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Order FILES by their highest landmark scores for QUERY, with the text of the best block."""
    if top < 1:
        raise ValueError(f"--top: expected at least 1, got {top}; pass for example --top 10")
    with Shown() as progress:
        from landmark.cli.tables import ranking_table, show
        from landmark.texts.loading import load, quiet
        from landmark.texts.rank import rank_files

        quiet()
        lines = rank_files(load(model, device, dtype), query, files, progress, chat=chat)
    show(ranking_table(lines[:top]))
