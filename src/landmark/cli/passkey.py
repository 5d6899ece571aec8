"""``landmark eval passkey``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, Model, Seed, integers, rope_factor, words
from landmark.cli.output import note
from landmark.cli.progress import Shown
from landmark.config import GREATEST


def passkey(
    model: Model = None,
    lengths: Annotated[
        str, typer.Option(help="Text tokens of the documents, with commas.")
    ] = "512,8192,32768",
    trials: Annotated[int, typer.Option(max=GREATEST, help="Documents of each length.")] = 50,
    top_k: Annotated[
        str | None, typer.Option(help="Retrieved blocks, with commas. By default the model's own.")
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="token_head, head, token, group, with commas. By default the model's own."
        ),
    ] = None,
    filler: Annotated[
        str, typer.Option(help="paper, pydoc, a text file or a folder of .txt, with commas.")
    ] = "paper",
    facts: Annotated[
        str | None, typer.Option(help="Ask for so many named facts instead of a pass key.")
    ] = None,
    distractors: Annotated[
        int, typer.Option(max=GREATEST, help="Named codes that are not asked for.")
    ] = 0,
    read: Annotated[
        str, typer.Option(help="Read documents without retrieval (local) or with (retrieve).")
    ] = "local",
    compare: Annotated[str | None, typer.Option(help="Second model, landmark or plain.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Plain models also with the first 64 and the latest N.")
    ] = None,
    rope: Annotated[
        str | None, typer.Option(help="Plain models also with dynamic[:FACTOR] RoPE scaling.")
    ] = None,
    plain_limit: Annotated[
        int, typer.Option(max=GREATEST, help="Longest document that plain models are asked about.")
    ] = 32768,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture: accuracy over length and depth.")
    ] = None,
) -> None:
    """Find a pass key, or named facts, in documents of any length: accuracy by length, filler, k
    and depth.
    """
    documents = integers("--lengths", lengths)
    counts = () if facts is None else integers("--facts", facts)
    retrieved = None if top_k is None else integers("--top-k", top_k)
    factor = rope_factor(rope)
    with Shown() as progress:
        from landmark.cli.tables import passkey_table, show
        from landmark.eval import passkey as task_module
        from landmark.eval import plots, results
        from landmark.eval.variants import load_variants
        from landmark.texts.loading import quiet

        task = task_module.PasskeyTask(
            lengths=documents,
            facts=counts,
            top_k=retrieved,
            trials=trials,
            fillers=words(filler),
            distractors=distractors,
            read=read,
            granularity=None if granularity is None else words(granularity),
            seed=seed,
            plain_limit=plain_limit,
        )
        if plot is not None:
            plots.require_picture(plot, "plot")
        quiet()
        variants = load_variants(
            model, compare, device=device, dtype=dtype, window=window, rope=factor
        )

        def tell(row: results.PasskeyRow) -> None:
            progress.rest()
            note(f"{row.model} {row.attention} {row.filler} {row.length}: {row.accuracy:.1%}")

        rows = task_module.run(
            variants, task, results.Recorder(out, variants[0].device, tell), progress
        )
    try:
        show(passkey_table(rows))
    finally:  # wherever nobody takes the table
        if plot is not None:
            plots.plot_passkey(rows, plot)
