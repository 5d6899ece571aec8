"""Results as rich tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from landmark.cli.output import in_line
from landmark.data.errors import names

if TYPE_CHECKING:
    from landmark.eval.results import (
        AgreementRow,
        IndexRow,
        PasskeyRow,
        PerplexityRow,
        QuestionsRow,
        RankRow,
        RecallRow,
    )
    from landmark.texts.rank import RankedDocument

BEYOND = "beyond the trained length"
PASSAGE = 80  # characters shown of a passage


def show(table: Table) -> None:
    """Prints a table on stdout, never cutting a cell."""
    console = Console()
    console.width = max(console.width, 150 if not console.is_terminal else console.width)
    with names("stdout"):
        console.print(table)


def cell(value: object) -> Text:
    """Returns a cell that shows a value as it stands, a dash for ``None``.

    Nothing in it is markup or a control character.
    """
    return Text("-" if value is None else in_line(str(value)))


def _title(text: str) -> Text:
    return Text(in_line(text), style="table.title")


def passkey_table(rows: Sequence[PasskeyRow]) -> Table:
    """Returns accuracy by model, length and settings."""
    table = Table(title="Pass key" if all(row.task == "passkey" for row in rows) else "Named facts")
    columns = (
        "model",
        "attention",
        "read",
        "filler",
        "k",
        "granularity",
        "facts",
        "length",
        "right",
        "accuracy",
        "s/trial",
    )
    for name in columns:
        table.add_column(
            name,
            justify="right"
            if name in {"k", "facts", "length", "right", "accuracy", "s/trial"}
            else "left",
        )
    table.add_column("note")
    for row in rows:
        table.add_row(
            cell(row.model),
            cell(row.attention),
            cell(row.read),
            cell(row.filler),
            cell(row.top_k),
            cell(row.granularity),
            str(row.facts),
            f"{row.length:,}",
            f"{row.correct}/{row.asked}",
            f"{row.accuracy:.1%}",
            f"{row.seconds / row.trials:.3f}",
            BEYOND if row.beyond_trained else "",
        )
    return table


def recall_table(rows: Sequence[RecallRow]) -> Table:
    """Returns recall by layer, a block of lines for each length and choice of settings."""
    table = Table(title="Blocks with the answer that are retrieved")
    for name in ("filler", "read", "granularity"):
        table.add_column(name)
    for name in ("k", "facts", "length", "answers", "layer", "best head", "mean head", "any head"):
        table.add_column(name, justify="right")
    for row in rows:
        for layer in row.layers:
            heads = layer["heads"]
            table.add_row(
                cell(row.filler),
                cell(row.read),
                cell(row.granularity),
                str(row.top_k),
                str(row.facts),
                f"{row.length:,}",
                f"{row.correct}/{row.asked}",
                str(layer["layer"]),
                f"{max(heads):.1%}",
                f"{sum(heads) / len(heads):.1%}",
                f"{layer['any_head']:.1%}",
            )
    return table


def questions_table(rows: Sequence[QuestionsRow]) -> Table:
    """Returns how right questions are answered, by context and length."""
    table = Table(title=_title(f"Questions, {rows[0].data}" if rows else "Questions"))
    for name in ("model", "attention", "context", "filler", "read", "granularity"):
        table.add_column(name)
    for name in ("k", "length", "texts", "asked", "contains", "in other words"):
        table.add_column(name, justify="right")
    for name in ("exact", "F1", "evidence retrieved"):
        table.add_column(name, justify="right")
    for row in rows:
        other_right = len(set(row.right) & set(row.other_words))
        best = max((max(layer["heads"]) for layer in row.layers), default=None)
        table.add_row(
            cell(row.model),
            cell(row.attention),
            cell(row.context),
            cell(row.filler),
            cell(row.read),
            cell(row.granularity),
            cell(row.top_k),
            cell(None if row.length is None else f"{row.length:,}"),
            str(row.texts),
            str(row.asked),
            f"{row.contains:.1%}",
            f"{other_right}/{len(row.other_words)}",
            f"{row.exact:.1%}",
            f"{row.f1:.3f}",
            cell(None if best is None else f"{best:.1%}"),
        )
    return table


def agreement_table(rows: Sequence[AgreementRow]) -> Table:
    """Returns how far models agree with a reference, which has the first row."""
    reference = f"Agreement with {rows[0].reference}, {rows[0].data}" if rows else "Agreement"
    table = Table(title=_title(reference))
    for name in ("model", "attention", "dtype"):
        table.add_column(name)
    for name in ("prompts", "tokens", "agree", "conversations", "tokens", "perplexity"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            cell(row.model),
            cell(row.attention),
            cell(row.dtype),
            str(row.prompts),
            str(row.answer_tokens),
            cell(None if row.agreement is None else f"{row.agreement:.2%}"),
            str(row.conversations),
            str(row.tokens),
            cell(None if row.perplexity is None else f"{row.perplexity:.3f}"),
        )
    return table


def perplexity_table(rows: Sequence[PerplexityRow]) -> Table:
    """Returns perplexities in the columns of the paper's Table 1."""
    table = Table(title=_title(f"Perplexity, {rows[0].data}" if rows else "Perplexity"))
    for name in ("model", "attention"):
        table.add_column(name)
    for name in ("eval length", "local", "blocks", "k", "attention size", "perplexity"):
        table.add_column(name, justify="right")
    table.add_column("note")
    for row in rows:
        notes = ["no retrieval"] if row.top_k == 0 else []
        notes += [row.scheme] if row.top_k else []
        notes += [BEYOND] if row.beyond_trained else []
        table.add_row(
            cell(row.model),
            cell(row.attention),
            f"{row.length:,}",
            str(row.local),
            cell("all" if row.blocks is None and row.top_k else row.blocks),
            cell(row.top_k),
            str(row.attention_size),
            f"{row.perplexity:.2f}",
            ", ".join(notes),
        )
    return table


def ranking_table(lines: Sequence[RankedDocument]) -> Table:
    """Returns documents as they were ranked, the passage cut to one line."""
    table = Table(title="Documents by their highest landmark score")
    for name in ("rank", "file", "score", "passage"):
        table.add_column(
            name, justify="right" if name in {"rank", "score"} else "left", no_wrap=True
        )
    for place, line in enumerate(lines, 1):
        passage = textwrap.shorten(line.passage, PASSAGE, placeholder=" ...")
        table.add_row(str(place), cell(line.title), f"{line.score:.3f}", cell(passage))
    return table


def rank_table(rows: Sequence[RankRow]) -> Table:
    """Returns how often passages led to their documents, by ranker."""
    table = Table(
        title=_title(f"A passage's document, {rows[0].data}" if rows else "A passage's document")
    )
    for name in ("ranker", "model", "text"):
        table.add_column(name)
    for name in ("documents", "tokens", "passages", "recall@1", "nDCG@10", "s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            cell(row.ranker),
            cell(row.model),
            cell(row.text),
            str(row.documents),
            f"{row.tokens:,}",
            str(row.passages),
            f"{row.recall_at_1:.1%}",
            f"{row.ndcg_at_10:.3f}",
            f"{row.seconds:.1f}",
        )
    return table


def index_table(rows: Sequence[IndexRow]) -> Table:
    """Returns what each kind of index found, and how fast."""
    title = (
        f"{rows[0].model}, layer {rows[0].layer}, top {rows[0].top_k}, {rows[0].data}"
        if rows
        else ""
    )
    table = Table(title=_title(f"Index over landmarks: {title}"))
    table.add_column("index")
    for name in (
        "landmarks",
        "recorded",
        "heads",
        "recall",
        "ms a step",
        "ms a chunk",
        "s to build",
        "MB",
        "settings",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            cell(row.index),
            f"{row.landmarks:,}",
            f"{row.recorded:,}",
            str(row.heads),
            "-" if row.recall is None else f"{row.recall:.2%}",
            f"{row.step_ms:.3f}",
            f"{row.chunk_ms:.1f}",
            f"{row.build_seconds:.2f}",
            f"{row.nbytes / 1e6:.1f}",
            ", ".join(f"{name} {value}" for name, value in row.settings.items()),
        )
    return table


def facts_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Returns names and values side by side."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, cell(value))
    return table
