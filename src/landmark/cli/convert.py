"""``landmark convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import integers
from landmark.cli.output import say
from landmark.cli.progress import Shown
from landmark.config import LandmarkConfig
from landmark.data.characters import require_utf8


def convert(
    model: Annotated[
        str, typer.Argument(help="Folder or hub name of a causal language model with RoPE.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the landmark model and its tokenizer.")],
    block_size: Annotated[
        int, typer.Option(help="Positions of a block, landmark included.")
    ] = LandmarkConfig.block_size,
    top_k: Annotated[
        int, typer.Option(help="Blocks that a query retrieves.")
    ] = LandmarkConfig.top_k,
    granularity: Annotated[
        str, typer.Option(help="Who shares a choice of blocks: token_head, head, token or group.")
    ] = LandmarkConfig.granularity,
    positions: Annotated[
        str, typer.Option(help="RoPE positions of retrieved blocks: stingy or exact.")
    ] = LandmarkConfig.positions,
    local_blocks: Annotated[
        int, typer.Option(help="Finished blocks before its own that a query always sees.")
    ] = LandmarkConfig.local_blocks,
    max_blocks: Annotated[
        int | None, typer.Option(help="Latest blocks to retrieve from. By default all.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers that retrieve, separated by commas. By default all.")
    ] = None,
    chunk_tokens: Annotated[
        int, typer.Option(help="Text tokens computed at once.")
    ] = LandmarkConfig.chunk_tokens,
    trained_length: Annotated[
        int | None,
        typer.Option(help="Positions that it is trained on. By default the model's maximum."),
    ] = None,
) -> None:
    """Convert a causal language model with RoPE to a landmark model, and save it.

    Its tokenizer is saved with it.
    """
    with Shown() as progress:
        import landmark
        from landmark.data import outputs
        from landmark.hf.bundled import model_folder
        from landmark.texts.loading import quiet, require_model, tokenizer_of

        source = model_folder(model)
        require_utf8(source, "model")
        require_model(source)
        outputs.require_folder(out, "out")
        require_utf8(out, "out")
        quiet()
        tokenizer = tokenizer_of(source)
        progress("converting, and comparing with the model as it was")
        converted = landmark.convert(
            source,
            block_size=block_size,
            top_k=top_k,
            granularity=granularity,
            positions=positions,
            local_blocks=local_blocks,
            max_blocks=max_blocks,
            layers=None if layers is None else integers("--layers", layers),
            chunk_tokens=chunk_tokens,
            trained_length=trained_length,
        )
        progress("saving")
        parts = [converted] if tokenizer is None else [tokenizer, converted]
        outputs.write_folder(out, lambda folder: [part.save_pretrained(folder) for part in parts])
    has = "without a tokenizer: the source has none" if tokenizer is None else "with its tokenizer"
    say(
        f"{type(converted).__name__} saved in {out} {has}. Its landmark is not trained yet: "
        "landmark train"
    )
