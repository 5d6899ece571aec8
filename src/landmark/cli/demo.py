"""``landmark demo``."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from landmark.cli.options import Device, Dtype, Model, Seed
from landmark.cli.output import in_line, say
from landmark.cli.progress import Shown

if TYPE_CHECKING:
    from rich.console import Console

    from landmark.eval.demo import Reopened, Trial
    from landmark.eval.dense import DenseRun

WANTED = 9
SHOWN_BLOCKS = 3
SHOWN_CHARACTERS = 150


def demo(
    text: Annotated[
        Path | None,
        typer.Option(help="Text file to hide keys in. By default Python's language reference."),
    ] = None,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Path of the picture.")] = Path("out/demo.png"),
    dense: Annotated[bool, typer.Option(help="Also run the same weights densely, once.")] = True,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find pass keys in a long real text, and show what was read for each.

    One memory is saved and opened again. The same weights run densely once, to compare.
    """
    begun = time.perf_counter()
    with Shown() as progress:
        from rich.console import Console

        from landmark.eval import demo as work
        from landmark.eval import plots
        from landmark.eval.dense import run_dense
        from landmark.texts.loading import load, quiet, require_landmark

        quiet()
        console = Console(soft_wrap=True, highlight=False)
        loaded = load(model, device, dtype)
        require_landmark(loaded)
        filler = work.load_text(text, loaded.tokenizer, progress)
        with contextlib.suppress(ModuleNotFoundError):  # then there is no picture
            plots.require_picture(out, "out")
        settings = loaded.model.landmark
        progress.rest()
        say(
            f"Model {loaded.name}: trained on {settings.trained_length} positions, retrieves "
            f"{settings.top_k} blocks. Text {filler.name}: {len(filler.ids):,} tokens. In each "
            f"part of it, a pass key and {work.DISTRACTORS} other codes at random places. "
            "Documents are read without retrieval; the question retrieves."
        )
        say("")
        trials = []
        for trial in work.run_trials(loaded, filler, seed, progress):
            trials.append(trial)
            progress.rest()
            _print_trial(console, len(trials), trial)
        right = sum(trial.right for trial in trials)
        console.print(f"[bold]{right} of {len(trials)} right[/bold]")
        compared = None
        if dense:
            number = work.compared_number(filler)
            progress("the same weights, densely")
            compared = run_dense(loaded, work.build_document(loaded, filler, number, seed))
            progress.rest()
            _print_dense(trials[number], compared)
    twin = work.recorded_twin(work.DENSE_LENGTH) if model is None else None
    if twin is not None:
        console.print(
            f"Recorded: the plain-attention twin, trained identically, finds {twin.accuracy:.0%} "
            f"of {twin.trials} keys at {twin.length:,} tokens ({twin.filler} filler)."
        )
    try:
        work.draw(trials, compared, out)
        say(f"Picture: {out}")
    except ModuleNotFoundError as error:
        say(f"No picture: {error}")
    console.print(f"{time.perf_counter() - begun:.0f} s in all")
    same = all(trial.reopened.same for trial in trials if trial.reopened is not None)
    if right < WANTED * len(trials) / 10 or not same:
        raise typer.Exit(1)


def _print_trial(console: Console, number: int, trial: Trial) -> None:
    from rich.markup import escape

    verdict = (
        "[green]right[/green]" if trial.right else f"[red]wrong[/red], the key is {trial.expected}"
    )
    console.print(
        f"[bold]{number}. {trial.length:,} tokens[/bold], key at {trial.place / trial.length:.0%}: "
        f"What is the pass key? [bold]{escape(in_line(trial.answer))}[/bold] ({verdict}) "
        f"read in {trial.read_seconds:.1f} s, answered in {trial.answer_seconds:.2f} s"
    )
    for block in trial.blocks[:SHOWN_BLOCKS]:
        mark = "*" if block.has_fact else " "
        text = " ".join(block.text.split())
        say(f"  {mark} block {block.block:>4} {block.share:>4.0%}  {_cut(text, trial.expected)}")
    if trial.reopened is not None:
        _print_reopened(console, trial.reopened)


def _print_reopened(console: Console, found: Reopened) -> None:
    from rich.markup import escape

    verdict = (
        "[green]the same answer[/green]" if found.same else "[red]another answer than before[/red]"
    )
    console.print(
        f"  [bold]Saved and opened again[/bold]: {found.saved_bytes / 2**20:,.0f} MiB on the disk "
        f"in {found.save_seconds:.1f} s, opened in {found.open_seconds * 1e3:,.0f} ms without "
        f"reading its blocks\n  Asked on a fork: [bold]{escape(in_line(found.answer))}[/bold] "
        f"({verdict}) in {found.answer_seconds:.2f} s, {found.fetched_bytes / 2**20:,.0f} MiB of "
        "blocks read for it"
    )


def _cut(text: str, wanted: str) -> str:
    """Cuts a text to ``SHOWN_CHARACTERS``, around the key where it stands in it."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    found = text.find(wanted)
    start = (
        0 if found < 0 else max(0, min(found - SHOWN_CHARACTERS // 2, len(text) - SHOWN_CHARACTERS))
    )
    cut = text[start : start + SHOWN_CHARACTERS]
    return (
        ("... " if start else "") + cut + (" ..." if start + SHOWN_CHARACTERS < len(text) else "")
    )


def _print_dense(trial: Trial, dense: DenseRun) -> None:
    from rich.table import Table

    from landmark.cli.tables import cell, show

    table = Table(title=f"The same weights at {dense.length:,} tokens")
    for name in (
        "",
        "read",
        "question and answer",
        "peak memory",
        "memory of the text",
        "keys per query",
        "answer",
    ):
        table.add_column(name, justify="right" if name else "left")
    for label, run in (("landmark", trial), ("dense (every token to every earlier one)", dense)):
        table.add_row(
            label,
            f"{run.read_seconds:.1f} s",
            f"{run.answer_seconds:.2f} s",
            "-" if run.peak_bytes is None else f"{run.peak_bytes / 2**20:,.0f} MiB",
            f"{run.cache_bytes / 2**20:,.0f} MiB",
            f"{run.keys_per_query:,}",
            cell(f"{run.answer} ({'right' if run.right else 'wrong'})"),
        )
    show(table)
