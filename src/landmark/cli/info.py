"""``landmark info``."""

from __future__ import annotations

from landmark.cli.output import say


def info() -> None:
    """Show versions, devices, the implementation that would run, and the bundled model."""
    from rich.console import Console

    from landmark.cli.tables import facts_table, show
    from landmark.data.errors import names
    from landmark.eval import info as facts

    console = Console(soft_wrap=True, highlight=False)
    for title, lines in (
        ("Versions", facts.version_lines()),
        ("Devices", facts.device_lines()),
        ("Attention", facts.attention_lines()),
    ):
        with names("stdout"):
            console.print(f"[bold]{title}[/bold]")
        for line in lines:
            say(f"  {line}")
    show(facts_table("Bundled model", facts.bundled_rows()))
