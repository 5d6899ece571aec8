"""``landmark eval perplexity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, Model, Rope, Seed, integers
from landmark.cli.output import note
from landmark.cli.progress import Shown
from landmark.config import GREATEST


def perplexity(
    data: Annotated[
        str, typer.Option(help="Folder of .txt files, .txt or .jsonl file, or data set of the hub.")
    ],
    model: Model = None,
    lengths: Annotated[
        str, typer.Option(help="Text tokens of a segment, separated by commas.")
    ] = "512,2048,4096",
    local: Annotated[
        str, typer.Option(help="Text tokens of a chunk (scheme paper), separated by commas.")
    ] = "250",
    blocks: Annotated[
        int | None, typer.Option(help="Latest blocks to retrieve from. By default all.")
    ] = None,
    top_k: Annotated[
        str,
        typer.Option(
            help="Blocks that a query retrieves, separated by commas; 0 for none at equal "
            "attention size."
        ),
    ] = "4",
    scheme: Annotated[
        str, typer.Option(help="What is local: paper (the whole chunk) or blocks (by block index).")
    ] = "paper",
    local_blocks: Annotated[
        str, typer.Option(help="Local blocks (scheme blocks), separated by commas.")
    ] = "2",
    granularity: Annotated[
        str | None,
        typer.Option(
            help="Who shares a choice of blocks: token_head, head, token or group. By default the "
            "model's own."
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Second model to measure, landmark or plain.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Measure plain models also with a sliding window of so many tokens beside the "
            "first 64."
        ),
    ] = None,
    rope: Rope = None,
    max_tokens: Annotated[int, typer.Option(max=GREATEST, help="Most tokens to measure.")] = 1
    << 18,
    split: Annotated[str, typer.Option(help="Split of the data to read.")] = "test",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Path of a picture: perplexity over length.")
    ] = None,
) -> None:
    """Measure perplexity in the columns of the paper's Table 1.

    Every evaluation length is measured on the same text.
    """
    counts = {
        "lengths": integers("--lengths", lengths),
        "local": integers("--local", local),
        "local_blocks": integers("--local-blocks", local_blocks),
        "top_k": integers("--top-k", top_k),
    }
    with Shown() as progress:
        from landmark.cli.tables import perplexity_table, show
        from landmark.data.text import read_documents
        from landmark.eval import perplexity as task_module
        from landmark.eval import plots, results
        from landmark.eval.variants import RopeScaling, load_variants
        from landmark.texts.loading import quiet

        task = task_module.PerplexityTask(
            **counts,
            scheme=scheme,
            blocks=blocks,
            granularity=granularity,
            max_tokens=max_tokens,
            seed=seed,
        )
        if plot is not None:
            plots.require_picture(plot, "plot")
        documents = list(read_documents(data, split=split))
        quiet()
        variants = load_variants(
            model, compare, device=device, dtype=dtype, window=window, rope=RopeScaling.read(rope)
        )

        def tell(row: results.PerplexityRow) -> None:
            progress.rest()
            note(f"{row.model} {row.attention} {row.length} k={row.top_k}: {row.perplexity:.2f}")

        report = results.Recorder(out, variants[0].device, tell)
        rows = task_module.run(
            variants, task, documents, f"{Path(data).name}, {split}", report, progress
        )
    try:
        show(perplexity_table(rows))
    finally:  # wherever nobody takes the table
        if plot is not None:
            plots.plot_perplexity(rows, plot)
