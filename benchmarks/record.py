"""Writes the file of a result: what it was made with, which part of a whole it is, the figures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from landmark.versions import root, sources_on_disk

CHANGED = "changed while it ran"


def write(path: Path, made_with: dict[str, Any], figures: dict[str, Any]) -> None:
    """Writes one result file whole, or leaves the one that is there; makes its folder.

    Args:
        path: of the JSON file.
        made_with: ``landmark.versions.made_with``, called before the first measurement. Where the
            sources have changed since, the file says so.
        figures: what was measured, by name; a list gets a line for each element.
    """
    if made_with["sources"] is not None and sources_on_disk(root()) != made_with["sources"]:
        made_with = {**made_with, "sources": CHANGED}
    content = {"versions": made_with, **figures}
    parts = [f"{json.dumps(name)}: {_lines(value)}" for name, value in content.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.part")
    whole.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    os.replace(whole, path)


def part(name: str, all_parts: Sequence[str]) -> dict[str, Any]:
    """Returns what a file says that holds one part of a result, as an entry of ``figures``."""
    return {"part": {"name": name, "of": list(all_parts)}}


def _lines(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
