"""Writes the model card of the bundled model and that of its twin, and the figures in the package.

python benchmarks/model_cards.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import ROOT, bundled_results, table, versions_line

FOLDERS = {
    "landmark": ROOT / "src" / "landmark" / "bundled" / "landmark",
    "twin": ROOT / "benchmarks" / "twin",
}

KINDS = {
    "landmark": (
        "a language model of 12.2M parameters with landmark attention, trained on rows of up to "
        "16,384 positions"
    ),
    "twin": (
        "the plain-attention twin of the bundled landmark model: the same recipe, rows and order, "
        "no landmarks and so no position gaps"
    ),
}

COMMANDS = {
    name: f"landmark train --data books --out out/{name} --config recipes/bundled.json{plain} "
    "--tokenizer src/landmark/bundled/landmark"
    for name, plain in (("landmark", ""), ("twin", " --plain"))
}

LIMITS = """A small model trained on English books of the public domain and on \
synthetic retrieval episodes. It
finds codes and repeats passages; it knows nothing, follows no instructions and repeats the \
language and the views of
its texts. Digits are single tokens. Keys and named facts are stated and asked for in \
wordings that were trained on
(with other codes, in other texts): how it answers other wordings was not measured. It is \
there to show and to test
landmark attention, nothing else."""


def main() -> None:
    """Writes both cards, and the figures in the package."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Returns what each file has to hold, by its path."""
    found = {folder / "README.md": card(name) for name, folder in FOLDERS.items()}
    found[FOLDERS["landmark"] / "figures.json"] = package_figures()
    return found


def package_figures() -> str:
    """Returns ``figures.json``: what `landmark info` and `landmark demo` say was recorded."""
    results = bundled_results()
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    return f'{{"versions": {json.dumps(results["versions"])},\n"rows": [\n{rows}\n]}}\n'


def card(name: str) -> str:
    """Returns one model's card."""
    summary = json.loads((FOLDERS[name] / "training_summary.json").read_text(encoding="utf-8"))
    figures = bundled_results()
    versions = ", ".join(f"{key} {value}" for key, value in summary["versions"].items() if value)
    rows = [row for row in figures["rows"] if Path(row["model"]).name == name]
    held_out = summary["evaluations"][-1]
    tokens = sum(text["tokens"] for text in summary["texts"])
    return f"""# {name}

This is {KINDS[name]}. Apache-2.0.

## How it was made

    {COMMANDS[name]}

{summary["steps"]:,} steps, {summary["tokens"]:,} text tokens, \
{summary["seconds"]:.0f} seconds ({versions}).
`recipe.json` has every setting, `training_summary.json` every loss. Held out at the end: text loss
{held_out["text_loss"]:.3f}, answers right {held_out["episodes_accuracy"]:.1%}.

## Limits

{LIMITS}

## Figures

Made by the commands of `benchmarks/bundled.py` ({versions_line(figures)}). \
`benchmarks/results` has the settings
and seed of every row. Books are the held-out ones.

{passkey_table(rows)}

{perplexity_table(rows)}

## Texts

{len(summary["texts"])} books, {tokens:,} tokens together. Title, tokens and SHA-256 of each are in
`training_summary.json`.
"""


def passkey_table(rows: list[dict[str, Any]]) -> str:
    """Returns pass keys and named facts, one line for all lengths of a setting."""
    found = [row for row in rows if "accuracy" in row]
    lengths = sorted({row["length"] for row in found})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in found:
        key = (
            row["attention"],
            "/".join(Path(row["filler"]).parts[-2:]),
            "pass key" if row["task"] == "passkey" else f"{row['facts']} named",
            row["read"],
            str(row["top_k"] or ""),
            row["granularity"] or "",
        )
        lines.setdefault(key, {})[row["length"]] = f"{row['correct']}/{row['asked']}"
    head = [
        "attention",
        "filler",
        "asked for",
        "read",
        "k",
        "granularity",
        *(f"{length:,}" for length in lengths),
    ]
    body = [[*key, *(cells.get(length, "") for length in lengths)] for key, cells in lines.items()]
    return table(head, body)


def perplexity_table(rows: list[dict[str, Any]]) -> str:
    """Returns perplexities in the columns of the paper's Table 1."""
    head = [
        "attention",
        "scheme",
        "eval length",
        "local",
        "blocks",
        "k",
        "attention size",
        "perplexity",
        "",
    ]
    body = []
    for row in rows:
        if "perplexity" in row:
            note = "beyond the trained length" if row["beyond_trained"] else ""
            blocks = row["blocks"] if row["blocks"] is not None else "all" if row["top_k"] else ""
            cells = [
                row["attention"],
                row["scheme"],
                row["length"],
                row["local"],
                blocks,
                row["top_k"],
            ]
            body.append([*cells, row["attention_size"], f"{row['perplexity']:.2f}", note])
    return table(head, body)


if __name__ == "__main__":
    main()
