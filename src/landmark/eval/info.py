"""Describe this installation, and the bundled model."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from landmark.config import LandmarkConfig
from landmark.eval.results import FIGURES, PasskeyRow, PerplexityRow, Row, read
from landmark.hf.bundled import model_path
from landmark.ops.choice import explain_impl
from landmark.versions import versions

Figure = TypeVar("Figure", PasskeyRow, PerplexityRow)

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "matplotlib",
    "datasets",
    "peft",
    "accelerate",
)


def version_lines() -> list[str]:
    """Returns a line for each package and one for the commit of a checkout.

    Optional packages that are missing are named too.
    """
    found = versions(*_PACKAGES)
    commit = found.pop("commit")
    lines = [f"{name} {version or 'not installed'}" for name, version in found.items()]
    return lines if commit is None else [*lines, f"commit {commit}"]


def device_lines() -> list[str]:
    """Returns a line for each device that torch can use."""
    lines = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        lines.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("cuda: not available (no GPU, or a torch built without CUDA)")
    return lines


def attention_lines() -> list[str]:
    """Returns which implementation would run here in bfloat16, and why not the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = explain_impl(torch.empty(1, 1, 1, 64, device=device, dtype=torch.bfloat16))
    return [f"{choice.chosen}: chosen"] + [
        f"{name}: not chosen, {why}" for name, why in choice.refused.items()
    ]


def bundled_rows() -> list[tuple[str, str]]:
    """Returns what the bundled model is and its main figures, as (name, value).

    Its model card has the other figures.
    """
    try:
        folder = model_path()
    except (FileNotFoundError, ModuleNotFoundError) as error:
        return [("missing", str(error))]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = LandmarkConfig.from_dict(config["landmark"])
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    kind = f"{config['model_type']}, {config['num_hidden_layers']} layers"
    rows = [
        ("model", f"{kind}, blocks of {settings.block_size}, top_k {settings.top_k}"),
        ("folder", str(folder)),
        ("weights", f"{weights / 1e6:.1f} MB"),
        ("trained length", f"{settings.trained_length} positions"),
    ]
    if (folder / FIGURES).is_file():
        rows += _headlines(read(folder / FIGURES), settings)
    return [*rows, ("all figures", f"in its model card, {folder / 'README.md'}")]


def _headlines(rows: Sequence[Row], settings: LandmarkConfig) -> list[tuple[str, str]]:
    """Returns the figures at the greatest lengths, recorded with the model's own settings."""
    found = []
    asked = [row for row in rows if isinstance(row, PasskeyRow) and _is_own(row.settings, settings)]
    keys = _longest([row for row in asked if row.task == "passkey"])
    if keys:
        right = sum(row.correct for row in keys)
        trials = sum(row.asked for row in keys)
        found.append(("pass key", f"{right} of {trials} right at {keys[0].length:,} tokens"))
    facts = _longest([row for row in asked if row.task == "facts"])
    if facts:
        shares = ", ".join(f"{row.accuracy:.0%} of {row.facts}" for row in facts)
        found.append(("named facts", f"{shares} at {facts[0].length:,} tokens"))
    measured = [row for row in rows if isinstance(row, PerplexityRow)]
    own = _longest([row for row in measured if _is_own(row.settings, settings)])
    for row in own[:1]:
        plain = [
            each for each in measured if each.attention == "full" and each.length == row.length
        ]
        beside = (
            f" (plain attention, trained identically: {plain[0].perplexity:.2f})" if plain else ""
        )
        found.append(("perplexity", f"{row.perplexity:.2f} at {row.length:,} tokens{beside}"))
    return found


def _longest(rows: Sequence[Figure]) -> list[Figure]:
    longest = max((row.length for row in rows), default=0)
    return [row for row in rows if row.length == longest]


def _is_own(settings: dict[str, Any], own: LandmarkConfig) -> bool:
    """Returns whether a row was measured with the model as it is saved.

    Settings that were not known when it was measured had their defaults.
    """
    return {**LandmarkConfig().to_dict(), **settings} == own.to_dict()
