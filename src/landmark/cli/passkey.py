"""``landmark eval passkey``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, Model, Rope, Seed, integers, words
from landmark.cli.output import note
from landmark.cli.progress import Shown
from landmark.config import GREATEST

Lengths = Annotated[str, typer.Option(help="Text tokens of the documents, separated by commas.")]
TopKs = Annotated[
    str | None,
    typer.Option(
        help="Blocks that a query retrieves, separated by commas. By default the model's own."
    ),
]
Granularities = Annotated[
    str | None,
    typer.Option(
        help="Who shares a choice of blocks: token_head, head, token or group, or a yardstick: "
        "latest, random, mean_key or block_mass; separated by commas. By default the model's own."
    ),
]
Fillers = Annotated[
    str,
    typer.Option(
        help="What documents are made of: paper, pydoc, text files or folders of .txt files, "
        "separated by commas."
    ),
]
Facts = Annotated[
    str | None,
    typer.Option(
        help="Numbers of named facts to ask for instead of a pass key, separated by commas."
    ),
]
Distractors = Annotated[
    int, typer.Option(max=GREATEST, help="Named codes in a document that are not asked for.")
]
Read = Annotated[
    str,
    typer.Option(
        help="How to prefill documents: local (local attention only) or retrieve (with retrieval)."
    ),
]


def passkey(
    model: Model = None,
    lengths: Lengths = "512,8192,32768",
    trials: Annotated[int, typer.Option(max=GREATEST, help="Documents of each length.")] = 50,
    top_k: TopKs = None,
    granularity: Granularities = None,
    filler: Fillers = "paper",
    facts: Facts = None,
    distractors: Distractors = 0,
    read: Read = "local",
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
    plain_limit: Annotated[
        int, typer.Option(max=GREATEST, help="Longest document that plain models read.")
    ] = 32768,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Path of a picture: accuracy over length and depth.")
    ] = None,
) -> None:
    """Measure how often a pass key, or named facts, are found in documents of any length."""
    documents = integers("--lengths", lengths)
    counts = () if facts is None else integers("--facts", facts)
    retrieved = None if top_k is None else integers("--top-k", top_k)
    with Shown() as progress:
        from landmark.cli.tables import passkey_table, show
        from landmark.eval import passkey as task_module
        from landmark.eval import plots, results
        from landmark.eval.variants import RopeScaling, load_variants
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
            model, compare, device=device, dtype=dtype, window=window, rope=RopeScaling.read(rope)
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
