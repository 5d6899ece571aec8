"""``landmark memory``: describe a saved memory, check it, and clean it up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.output import say
from landmark.cli.progress import Shown

Folder = Annotated[Path, typer.Argument(help="Folder of a saved memory.")]


def info(folder: Folder) -> None:
    """Show what a saved memory holds, and the bytes of its files."""
    from landmark.memory.archive.log import Archive
    from landmark.memory.archive.manifest import manifest_of, sources_of

    archive = Archive.open(folder)
    manifest = manifest_of(archive)
    lengths = archive.streams()
    model = manifest["model"]
    settings = ", ".join(f"{name} {value}" for name, value in manifest["settings"].items())
    notes = manifest["notes"]
    tokenizer = str(notes.get("tokenizer", "not known"))[:12]
    for line in (
        f"{manifest['tokens']:,} tokens, saved {archive.commits} times, {sum(lengths.values()):,} "
        "bytes",
        f"model {model['type']} {model['fingerprint'][:12]}, {manifest['dtype']}; tokenizer "
        f"{tokenizer}",
        f"settings {settings}",
        "versions "
        f"{', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}",
        *(f"source {name}: {count:,} characters" for name, count in sources_of(notes) or ()),
        *(f"{name}: {length:,} bytes" for name, length in lengths.items()),
        *(
            f"{name}: {extra:,} bytes that do not count"
            for name, extra in archive.leftover().items()
        ),
    ):
        say(line)
    if archive.leftover():
        say("somebody is writing, or was interrupted while writing: see landmark memory compact")


def verify(folder: Folder) -> int:
    """Read a whole memory and name what is damaged; exit code 1 if anything is."""
    with Shown() as progress:
        from landmark.memory.archive.layer import verify as damaged
        from landmark.memory.archive.manifest import damage_of

        lines = damage_of(folder) or damaged(folder, progress)
    for line in lines:
        say(line)
    say(f"{len(lines)} damaged" if lines else "all is as it was written")
    return 1 if lines else 0


def compact(folder: Folder) -> None:
    """Remove what an interrupted writer left, which is no part of the memory."""
    from landmark.memory.archive.log import Archive
    from landmark.memory.archive.manifest import manifest_of

    archive = Archive.open(folder)
    manifest_of(archive)  # what it does not name would be removed
    left = archive.leftover()
    archive.lock()
    archive.unlock()
    say(f"{sum(left.values()):,} bytes removed{''.join(f', {name}' for name in left)}")
