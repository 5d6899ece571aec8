"""Options that several commands share, and lists that are separated by commas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.config import GREATEST
from landmark.data.characters import from_arguments

Model = Annotated[
    str | None,
    typer.Option(
        help="Model: folder or hub name. By default the bundled model. `smollm2` is "
        "SmolLM2-135M-Instruct with landmarks, and `smollm2@BASE` the same on other base weights, "
        "a folder or hub name, on which nothing was measured."
    ),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Dtype of the weights: auto (bfloat16 on a GPU, else float32), float32, bfloat16, "
        "float16 or float64."
    ),
]
Tier = Annotated[str, typer.Option(help="Lowest tier that holds blocks: device, host or disk.")]
SpillFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder for temporary files of tier disk. By default the system's, mostly /tmp."
    ),
]
InChat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Whether text and question are put into the tokenizer's chat template. By default "
        "where it has one.",
    ),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        max=GREATEST, help="Most tokens to write. By default 16, 256 with a chat template."
    ),
]
Rope = Annotated[
    str | None,
    typer.Option(
        help="Measure plain models also with RoPE scaling: dynamic or yarn, with a factor as in "
        "yarn:4."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=GREATEST, help="Random seed.")]


def text(word: str | None) -> str | None:
    """Returns a word of the command line that is a text, not a path; see ``from_arguments``."""
    return None if word is None else from_arguments(word)


def integers(option: str, text: str) -> tuple[int, ...]:
    """Reads integers separated by commas.

    Raises:
        ValueError: anything else, or integers beyond the limits of 32 bits.
    """
    try:
        found = tuple(int(part.replace("_", "")) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{option}: expected integers separated by commas, got {text!r}; write for example "
            f"{option} 2,4"
        ) from None
    if any(abs(number) > GREATEST for number in found):
        raise ValueError(
            f"{option}: expected integers of at most {GREATEST}, got {text!r}; pass smaller ones"
        )
    return found


def words(text: str) -> tuple[str, ...]:
    """Reads words separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
