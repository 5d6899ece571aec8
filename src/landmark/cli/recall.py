"""``landmark eval recall``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, Model, Seed, integers, words
from landmark.cli.output import note
from landmark.cli.passkey import Distractors, Facts, Fillers, Granularities, Lengths, Read, TopKs
from landmark.cli.progress import Shown
from landmark.config import GREATEST


def recall(
    model: Model = None,
    lengths: Lengths = "8192",
    trials: Annotated[int, typer.Option(max=GREATEST, help="Documents of each length.")] = 20,
    top_k: TopKs = None,
    granularity: Granularities = None,
    filler: Fillers = "paper",
    facts: Facts = None,
    distractors: Distractors = 0,
    read: Read = "local",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Measure which layers and heads retrieve the blocks that hold an answer."""
    documents = integers("--lengths", lengths)
    counts = () if facts is None else integers("--facts", facts)
    retrieved = None if top_k is None else integers("--top-k", top_k)
    with Shown() as progress:
        from landmark.cli.tables import recall_table, show
        from landmark.eval import recall as task_module
        from landmark.eval import results
        from landmark.eval.passkey import PasskeyTask
        from landmark.eval.variants import Variant
        from landmark.texts.loading import load, quiet

        task = PasskeyTask(
            lengths=documents,
            facts=counts,
            top_k=retrieved,
            trials=trials,
            fillers=words(filler),
            distractors=distractors,
            read=read,
            granularity=None if granularity is None else words(granularity),
            seed=seed,
        )
        quiet()
        variant = Variant.of(load(model, device, dtype))

        def tell(row: results.RecallRow) -> None:
            progress.rest()
            note(f"{row.filler} {row.length}: {row.correct} of {row.asked} answers right")

        rows = task_module.run(variant, task, results.Recorder(out, variant.device, tell), progress)
    show(recall_table(rows))
