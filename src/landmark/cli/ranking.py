"""``landmark eval rank``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, InChat, Model, Seed, words
from landmark.cli.output import note
from landmark.cli.progress import Shown
from landmark.config import GREATEST


def ranking(
    data: Annotated[
        str, typer.Option(help="Folder of .txt files, .txt or .jsonl file, or data set of the hub.")
    ],
    model: Model = None,
    passages: Annotated[
        int,
        typer.Option(max=GREATEST, help="Passages to look for, drawn evenly from the documents."),
    ] = 200,
    passage_tokens: Annotated[
        int, typer.Option(max=GREATEST, help="Text tokens of a passage.")
    ] = 126,
    max_tokens: Annotated[
        int | None,
        typer.Option(max=GREATEST, help="First tokens of each document to use. By default all."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of the data that passages are drawn from.")
    ] = "test",
    among: Annotated[
        str, typer.Option(help="Further splits whose documents are searched, separated by commas.")
    ] = "",
    seed: Seed = 0,
    chat: InChat = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Measure how often a passage leads to its document, by landmarks and by BM25."""
    with Shown() as progress:
        from landmark.cli.tables import rank_table, show
        from landmark.data.text import read_documents
        from landmark.eval import ranking as task_module
        from landmark.eval import results
        from landmark.texts.loading import load, quiet

        task = task_module.PassageTask(
            passages=passages,
            passage_tokens=passage_tokens,
            max_tokens=max_tokens,
            seed=seed,
            chat=chat,
        )
        documents = list(read_documents(data, split=split))
        others = [
            document for part in words(among) for document in read_documents(data, split=part)
        ]
        quiet()
        loaded = load(model, device, dtype)

        def tell(row: results.RankRow) -> None:
            progress.rest()
            note(f"{row.ranker}, text {row.text}: recall@1 {row.recall_at_1:.1%}")

        report = results.Recorder(out, loaded.device, tell)
        name = ", ".join([Path(data).name, split, *(f"among {part}" for part in words(among))])
        rows = task_module.run(loaded, task, documents, others, name, report, progress)
    show(rank_table(rows))
