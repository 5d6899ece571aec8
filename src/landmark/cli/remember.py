"""``landmark remember``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, InChat, Model, SpillFolder, Tier
from landmark.cli.output import say
from landmark.cli.progress import Shown


def remember(
    files: Annotated[
        list[Path],
        typer.Argument(help="Text files or folders of .txt files, read one after the other."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the memory; reading goes on where there is one.")
    ],
    tier: Tier = "disk",
    spill_folder: SpillFolder = None,
    retrieve: Annotated[
        bool, typer.Option("--retrieve", help="Prefill with retrieval, much slower.")
    ] = False,
    chat: InChat = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Read FILES into a memory on disk.

    The same command goes on after an interruption, and adds further files.
    """
    with Shown() as watch:
        from landmark.data.outputs import require_folder
        from landmark.texts.library import SavedProgress
        from landmark.texts.library import remember as remembered
        from landmark.texts.loading import load, quiet

        def show(found: SavedProgress) -> None:
            sizes = ", ".join(
                f"{tier} {size / 2**20:,.0f} MiB" for tier, size in found.nbytes.items() if size
            )
            speed = found.read / max(found.seconds, 1e-9)
            watch.rest()
            say(f"{found.tokens:,} of {found.total:,} tokens  {speed:,.0f} tokens/s  {sizes}")

        quiet()
        require_folder(out, "out")
        loaded = load(model, device, dtype)
        library = remembered(
            files,
            out,
            loaded,
            tier=tier,
            retrieve=retrieve,
            chat=chat,
            progress=show,
            watch=watch,
            spill_folder=spill_folder,
        )
    say(
        f"{library.tokens:,} tokens of {len(library.reading.sources)} texts are remembered in {out}"
    )
