"""``landmark eval questions``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from landmark.cli.options import Device, Dtype, Model, Rope, Seed, integers, words
from landmark.cli.output import note
from landmark.cli.passkey import Lengths, Read, TopKs
from landmark.cli.progress import Shown
from landmark.config import GREATEST


def questions(
    data: Annotated[
        str,
        typer.Option(
            help="Documents with questions: SQuAD JSON, a .jsonl file, stories of bAbI (.txt), or "
            "a data set of the hub."
        ),
    ],
    model: Model = None,
    lengths: Lengths = "4096",
    contexts: Annotated[
        str,
        typer.Option(
            help="What is given with a question, separated by commas: evidence, nothing, bm25, "
            "haystack."
        ),
    ] = "evidence,nothing,haystack",
    questions: Annotated[
        int | None, typer.Option(max=GREATEST, help="First questions to ask. By default all.")
    ] = None,
    bm25_tokens: Annotated[
        int, typer.Option(max=GREATEST, help="Text tokens of documents that BM25 finds.")
    ] = 512,
    filler: Annotated[
        str,
        typer.Option(
            help="What haystacks are filled up with: paper, pydoc, a text file or folder."
        ),
    ] = "pydoc",
    read: Read = "local",
    top_k: TopKs = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="As for eval passkey, or evidence: the blocks that hold the evidence and the best "
            "beside them; separated by commas."
        ),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Run the weights of landmark models densely, too.")
    ] = False,
    rope: Rope = None,
    compare: Annotated[
        str | None, typer.Option(help="Second model to measure, landmark or plain.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(max=GREATEST, help="Most tokens of an answer.")
    ] = 32,
    plain_limit: Annotated[
        int, typer.Option(max=GREATEST, help="Longest haystack that plain models read.")
    ] = 32768,
    split: Annotated[str, typer.Option(help="Split of a data set of the hub.")] = "validation",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Measure answers to questions about documents, alone and hidden among others."""
    haystacks = integers("--lengths", lengths)
    with Shown() as progress:
        from landmark.cli.tables import questions_table, show
        from landmark.data.questions import first_questions, read_question_sets
        from landmark.eval import questions as task_module
        from landmark.eval import results
        from landmark.eval.variants import RopeScaling, load_variants
        from landmark.texts.loading import quiet

        task = task_module.QuestionsTask(
            lengths=haystacks,
            contexts=words(contexts),
            bm25_tokens=bm25_tokens,
            filler=filler,
            read=read,
            top_k=None if top_k is None else integers("--top-k", top_k),
            granularity=None if granularity is None else words(granularity),
            max_new_tokens=max_new_tokens,
            plain_limit=plain_limit,
            seed=seed,
        )
        sets = first_questions(list(read_question_sets(data, split=split)), questions)
        quiet()
        variants = load_variants(
            model,
            compare,
            device=device,
            dtype=dtype,
            rope=RopeScaling.read(rope),
            dense=dense,
        )

        def tell(row: results.QuestionsRow) -> None:
            progress.rest()
            length = "" if row.length is None else f" {row.length}"
            note(f"{row.model} {row.context}{length}: {row.contains:.1%} contain the answer")

        rows = task_module.run(
            variants,
            sets,
            task,
            results.Recorder(out, variants[0].device, tell),
            data=Path(data).name,
            progress=progress,
        )
    show(questions_table(rows))
