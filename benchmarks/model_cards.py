"""Writes the model cards of the bundled models, and README's tables, from what was recorded.

python benchmarks/model_cards.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cases import CASES, PASSES, PEERS

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "src" / "landmark" / "bundled"
KERNELS = ROOT / "benchmarks" / "results" / "ops.json"

KINDS = {
    "landmark": (
        "a language model of 12.2M parameters with landmark attention, trained at 512 positions"
    ),
    "twin": (
        "the plain-attention twin of the bundled landmark model: the same recipe, rows and order, "
        "no landmarks and so no position gaps"
    ),
}

COMMANDS = {
    "landmark": "landmark train --data books --out out/landmark --config recipes/bundled.json",
    "twin": "landmark train --data books --out out/twin --config recipes/bundled.json --plain "
    "--tokenizer out/landmark --tokens out/landmark/tokens",
}

ATTENTION = {
    "full": "full attention",
    "window": "a window and the first 64",
    "dynamic": "dynamic RoPE scaling",
}
READ = {"retrieve": "with retrieval", "local": "without retrieval"}

LIMITS = """A small model trained on English books first published before 1919 and on \
synthetic retrieval episodes. It
finds codes and repeats passages; it knows nothing, follows no instructions and repeats the \
language and the views of
its texts. Digits are single tokens. Keys and named facts are stated and asked for in \
wordings that were trained on
(with other codes, in other texts): how it answers other wordings was not measured. It is \
there to show and to test
landmark attention, nothing else."""


def main() -> None:
    """Writes all of them."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Returns what each file has to hold."""
    figures = json.loads((BUNDLED / "landmark" / "figures.json").read_text(encoding="utf-8"))
    found = {BUNDLED / name / "README.md": card(name, figures) for name in KINDS}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, make in (
        ("passkey", passkey_summary),
        ("facts", facts_summary),
        ("perplexity", perplexity_summary),
    ):
        between = re.compile(f"(<!-- figures: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        readme = between.sub(
            lambda match, make=make: f"{match[1]}\n{make(figures['rows'])}\n\n{match[2]}", readme
        )
    results = json.loads(KERNELS.read_text(encoding="utf-8"))
    made = f"{kernels_summary(results)}\n\nMeasured with {versions_line(results)}."
    between = re.compile("(<!-- figures: kernels -->\n).*?(<!-- end: kernels -->)", re.DOTALL)
    readme = between.sub(lambda match: f"{match[1]}\n{made}\n\n{match[2]}", readme)
    return {**found, ROOT / "README.md": readme}


def passkey_summary(rows: list[dict[str, Any]]) -> str:
    """Returns pass keys over all fillers, one line for each way to look for them."""
    found = [row for row in rows if row.get("task") == "passkey"]
    lengths = sorted({row["length"] for row in found})
    lines: dict[str, dict[int, list[int]]] = {}
    for row in found:
        who = "the twin, converted and fine-tuned" if row["model"] == "tuned" else "landmarks"
        what = f"{who}, k = {row['top_k']}, {row['granularity']}, read {READ.get(row['read'])}"
        if row["attention"] != "landmark":
            what = f"plain twin, {ATTENTION[row['attention']]}"
        cell = lines.setdefault(what, {}).setdefault(row["length"], [0, 0])
        cell[0] += row["correct"]
        cell[1] += row["asked"]
    head = ["found / asked, by text tokens", *(f"{length:,}" for length in lengths)]
    return table(
        head,
        [[what, *("/".join(map(str, c.get(n, []))) for n in lengths)] for what, c in lines.items()],
    )


def facts_summary(rows: list[dict[str, Any]]) -> str:
    """Returns the share of named facts that was told, by their number and the length of the
    text.
    """
    found = {
        (row["length"], row["facts"]): row["accuracy"] for row in rows if row.get("task") == "facts"
    }
    numbers = sorted({facts for _, facts in found})
    head = ["text tokens, number of named facts", *map(str, numbers)]
    lengths = sorted({length for length, _ in found})
    cells = [
        [f"{n:,}", *(f"{found[n, f]:.0%}" if (n, f) in found else "" for f in numbers)]
        for n in lengths
    ]
    return table(head, cells)


def perplexity_summary(rows: list[dict[str, Any]]) -> str:
    """Returns perplexities inside the trained length, and the twin's beyond it."""
    lengths = sorted({row["length"] for row in rows if "perplexity" in row})
    lines: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in rows:
        if "perplexity" not in row or (row["beyond_trained"] and row["attention"] != "full"):
            continue
        size, local = (
            (row["attention_size"], row["local"]) if row["attention"] != "full" else ("all", "all")
        )
        what = (
            f"landmarks, k = {row['top_k']}, scheme {row['scheme']}"
            if row["top_k"]
            else "landmarks, no retrieval"
        )
        if row["attention"] != "landmark":
            what = f"plain twin, {ATTENTION[row['attention']]}"
        lines.setdefault((what, local, size), {})[row["length"]] = f"{row['perplexity']:.2f}"
    ordered = sorted(
        lines.items(), key=lambda line: (line[0][2] if line[0][2] != "all" else 10**9, line[0][0])
    )
    head = ["", "local tokens", "attention size", *(f"{length:,}" for length in lengths)]
    return table(
        head, [[*key, *(cells.get(length, "") for length in lengths)] for key, cells in ordered]
    )


def kernels_summary(results: dict[str, Any]) -> str:
    """Returns TFLOP/s of every peer and case as a Markdown table, and landmark attention as a
    multiple of cuDNN.
    """
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        cells.setdefault(row["case"], {})[row["peer"]] = row
    head = ["TFLOP/s"]
    for title in PASSES.values():
        head += [f"{title}: cuDNN", *list(PEERS.values())[1:], "landmark / cuDNN"]
    body = []
    for case in (name for name in CASES if name in cells):
        by_peer = cells[case]
        found = [case]
        for name in PASSES:
            found += [_cell(by_peer.get(peer), f"{name}_tflops", ".0f") for peer in PEERS]
            found.append(_cell(by_peer.get("landmark"), f"{name}_to_cudnn", ".2f"))
        body.append(found)
    return table(head, body)


def _cell(row: dict[str, Any] | None, name: str, form: str) -> str:
    if row is None or ("refused" not in row and row[name] is None):
        return ""
    return "refused" if "refused" in row else format(row[name], form)


def card(name: str, figures: dict[str, Any]) -> str:
    """Returns one model's card."""
    summary = json.loads((BUNDLED / name / "training_summary.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{key} {value}" for key, value in summary["versions"].items() if value)
    rows = [row for row in figures["rows"] if row["model"] == name]
    held_out = summary["evaluations"][-1]
    texts = "\n".join(
        f"| {t['title']} | {t['tokens']:,} | `{t['sha256']}` |" for t in summary["texts"]
    )
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

Made by `landmark eval` ({versions_line(figures)}); `figures.json` of the \
landmark model has the settings and
seed of every row. Books are the held-out ones.

{passkey_table(rows)}

{perplexity_table(rows)}

## Texts

| title | tokens | SHA-256 |
|---|---|---|
{texts}
"""


def versions_line(figures: dict[str, Any]) -> str:
    """Returns what the figures were measured with."""
    return ", ".join(f"{key} {value}" for key, value in figures["versions"].items() if value)


def passkey_table(rows: list[dict[str, Any]]) -> str:
    """Returns pass keys and named facts, one line for all lengths of a setting."""
    found = [row for row in rows if "accuracy" in row]
    lengths = sorted({row["length"] for row in found})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in found:
        key = (
            row["attention"],
            row["filler"],
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


def table(head: list[str], body: list[list[Any]]) -> str:
    """Returns a Markdown table; nothing for ``None``."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(
        "| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |"
        for line in lines
    )


if __name__ == "__main__":
    main()
