"""``landmark eval index``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, Model, Seed, integers, words
from landmark.cli.output import note
from landmark.cli.progress import Shown
from landmark.config import GREATEST


def index(
    model: Model = None,
    landmarks: Annotated[
        str, typer.Option(help="Numbers of landmarks, separated by commas.")
    ] = "1000",
    index: Annotated[
        str, typer.Option(help="Kinds of index, separated by commas.")
    ] = "exact,faiss-flat,faiss-ivf,faiss-hnsw",
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of .txt files, .txt or .jsonl file, or data set of the hub. By default "
            "Python's language reference."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data to read.")] = "test",
    max_tokens: Annotated[
        int | None,
        typer.Option(max=GREATEST, help="Most tokens to read; further landmarks are noisy copies."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer to measure. By default the middle one.")
    ] = None,
    queries: Annotated[
        int, typer.Option(max=GREATEST, help="Positions of text whose queries search.")
    ] = 256,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Measure recall and time of indexes over landmarks, beside scoring every one."""
    with Shown() as progress:
        from landmark.cli.tables import index_table, show
        from landmark.data.text import read_documents
        from landmark.eval import index as task_module
        from landmark.eval import results
        from landmark.eval.fillers import pydoc_text
        from landmark.texts.loading import load, quiet

        numbers = integers("--landmarks", landmarks)
        task = task_module.IndexTask(
            landmarks=numbers,
            kinds=words(index),
            layer=layer,
            queries=queries,
            max_tokens=max_tokens,
            seed=seed,
        )
        texts = (
            iter([pydoc_text()])
            if data is None
            else (each.text for each in read_documents(data, split=split))
        )
        name = "pydoc" if data is None else f"{Path(data).name}, {split}"
        quiet()
        loaded = load(model, device, dtype)

        def tell(row: results.IndexRow) -> None:
            progress.rest()
            note(f"{row.index}, {row.landmarks:,} landmarks: {row.step_ms} ms a step")

        report = results.Recorder(out, loaded.device, tell)
        rows = task_module.run(loaded, task, texts, name, report, progress)
    show(index_table(rows))
