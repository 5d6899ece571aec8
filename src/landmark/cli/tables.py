"""Results as rich tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from landmark.eval.results import PasskeyRow, PerplexityRow

BEYOND = "beyond the trained length"


def show(table: Table) -> None:
    """Prints a table on stdout, never cutting a cell."""
    console = Console()
    console.width = max(console.width, 150 if not console.is_terminal else console.width)
    console.print(table)


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
            name, justify="right" if name in {"k", "facts", "length", "right", "accuracy", "s/trial"} else "left"
        )
    table.add_column("note")
    for row in rows:
        table.add_row(
            row.model,
            row.attention,
            row.read,
            row.filler,
            _or_dash(row.top_k),
            _or_dash(row.granularity),
            str(row.facts),
            f"{row.length:,}",
            f"{row.correct}/{row.asked}",
            f"{row.accuracy:.1%}",
            f"{row.seconds / row.trials:.3f}",
            BEYOND if row.beyond_trained else "",
        )
    return table


def perplexity_table(rows: Sequence[PerplexityRow]) -> Table:
    """Returns perplexities in the columns of the paper's Table 1."""
    table = Table(title=f"Perplexity, {rows[0].data}" if rows else "Perplexity")
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
            row.model,
            row.attention,
            f"{row.length:,}",
            str(row.local),
            "all" if row.blocks is None and row.top_k else _or_dash(row.blocks),
            _or_dash(row.top_k),
            str(row.attention_size),
            f"{row.perplexity:.2f}",
            ", ".join(notes),
        )
    return table


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
