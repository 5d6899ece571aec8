"""``landmark eval agreement``."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, Model
from landmark.cli.output import note
from landmark.cli.progress import Shown
from landmark.config import GREATEST


def agreement(
    data: Annotated[
        str, typer.Option(help="Conversations: a .jsonl file, or a data set of the hub.")
    ],
    reference: Annotated[
        str, typer.Option(help="The model that answers, for example the one that was trained on.")
    ],
    model: Model = None,
    conversations: Annotated[
        int | None,
        typer.Option(min=1, max=GREATEST, help="First conversations to use. By default all."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(max=GREATEST, help="Most tokens of an answer.")
    ] = 128,
    split: Annotated[str, typer.Option(help="Split of a data set of the hub.")] = "test",
    device: Device = "auto",
    dtype: Dtype = "auto",
    reference_dtype: Annotated[
        str, typer.Option(help="As --dtype, of the reference. By default the same.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Measure how far a model answers as another one, and its perplexity of conversations."""
    with Shown() as progress:
        from landmark.cli.tables import agreement_table, show
        from landmark.data.conversations import read_conversations
        from landmark.eval import agreement as task
        from landmark.eval import results
        from landmark.eval.variants import Variant
        from landmark.texts.loading import load, quiet

        chats = list(islice(read_conversations(data, split=split), conversations))
        quiet()
        measured = Variant.of(load(model, device, dtype))
        answering = Variant.of(load(reference, device, reference_dtype or dtype))

        def tell(row: results.AgreementRow) -> None:
            progress.rest()
            agreed = "" if row.agreement is None else f" {row.agreement:.1%} of tokens agree"
            note(f"{row.model}:{agreed}")

        rows = task.run(
            [measured],
            answering,
            chats,
            results.Recorder(out, measured.device, tell),
            data=Path(data).name,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    show(agreement_table(rows))
