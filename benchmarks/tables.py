"""Fills the tables of README and docs/ from what was recorded.

python benchmarks/tables.py

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end: NAME -->``; ``TABLES`` says who
makes it. Its figures come from ``benchmarks/results/*.json``.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundled
from cases import CASES, PASSES, PEERS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REGION = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)

GENERATE_PARTS = ("small", "large", "real", "replayed")
ATTENTION = {
    "full": "full attention",
    "window": "a window and the first 64",
    "dynamic": "dynamic RoPE scaling",
}
COSTS = ("seconds", "peak_bytes")  # what differs between two measurements of one thing
READ = {"retrieve": "with retrieval", "local": "without retrieval"}

# Commands that the tables of README name.
PASSKEY = "`landmark eval passkey --model {} --lengths 512,32768 --top-k 2 --read retrieve`"
PERPLEXITY = "`landmark eval perplexity --data books --scheme blocks --compare out/twin`"
RANK = "`landmark eval rank --data books`"
FACTS = "`landmark eval passkey --filler books/test --facts 64 --lengths 8192 --read retrieve`"
SCRIPT = "`python benchmarks/{}.py`"
GENERATE = "`python benchmarks/generate.py --part large`"


def main() -> None:
    """Writes every page that has a table."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Returns what each page with tables has to hold, by its path."""
    found = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if REGION.search(text):
            found[path] = REGION.sub(
                lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", text
            )
    return found


def results(name: str) -> dict[str, Any]:
    """Returns one file of ``benchmarks/results``."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def bundled_results() -> dict[str, Any]:
    """Returns all rows of ``bundled.py`` but those of recall, and what they were made with.

    A row that several commands measured, such as the twin's, counts once.

    Raises:
        ValueError: they were not made with the same versions.
    """
    names = [name for name in bundled.commands() if (RESULTS / f"{name}.json").is_file()]
    found = [results(name) for name in names if name != "bundled-recall"]
    versions = found[0]["versions"]
    others = {json.dumps(each["versions"]) for each in found} - {json.dumps(versions)}
    if others:
        raise ValueError(
            f"results of bundled.py: expected one set of versions, got {versions} and "
            f"{', '.join(others)}; measure all of them at one commit"
        )
    rows = {}
    for row in (row for each in found for row in each["rows"]):
        same = {name: value for name, value in row.items() if name not in COSTS}
        rows.setdefault(json.dumps(same), row)
    return {"versions": versions, "rows": list(rows.values())}


def figures() -> list[dict[str, Any]]:
    """Returns the rows of ``bundled_results``."""
    return list(bundled_results()["rows"])


def passkey_summary() -> str:
    """Returns pass keys over all fillers, one line for each way to look for them."""
    found = [row for row in figures() if row.get("task") == "passkey"]
    lengths = sorted({row["length"] for row in found})
    lines: dict[str, dict[int, list[int]]] = {}
    for row in found:
        is_tuned = Path(row["model"]).name == "tuned"
        who = "the twin, converted and fine-tuned" if is_tuned else "landmarks"
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


def facts_summary() -> str:
    """Returns the share of named facts that was told, by their number and the length of the
    text.
    """
    found = {
        (row["length"], row["facts"]): row["accuracy"]
        for row in figures()
        if row.get("task") == "facts"
    }
    numbers = sorted({facts for _, facts in found})
    head = ["text tokens, number of named facts", *map(str, numbers)]
    lengths = sorted({length for length, _ in found})
    cells = [
        [f"{n:,}", *(f"{found[n, f]:.0%}" if (n, f) in found else "" for f in numbers)]
        for n in lengths
    ]
    return table(head, cells)


def recall_summary() -> str:
    """Returns how often each layer's best head retrieves the block with the answer."""
    rows = results("bundled-recall")["rows"]
    layers = [layer["layer"] for layer in rows[0]["layers"]]
    return table(
        ["named facts", "answers right", *(f"layer {layer}" for layer in layers)],
        [
            [
                str(row["facts"]),
                f"{row['correct']}/{row['asked']}",
                *(f"{max(layer['heads']):.0%}" for layer in row["layers"]),
            ]
            for row in rows
        ],
    )


def perplexity_summary() -> str:
    """Returns perplexities inside the trained length, and the twin's beyond it."""
    rows = figures()
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


def kernels() -> str:
    """Returns the table of the operation's kernels, and what they were measured with."""
    found = results("ops")
    measured = textwrap.fill(f"Measured with {versions_line(found)}.", 100)
    return f"{kernels_summary(found)}\n\n{measured}"


def reading() -> str:
    """Returns tokens a second of prefill behind memories of several lengths."""
    rows = results("read")["rows"]
    behind = sorted({row["remembered"] for row in rows})
    body = []
    for read, by in (
        ("retrieve", "kernels"),
        ("retrieve", "plain"),
        ("local", "kernels"),
        ("local", "plain"),
    ):
        speeds = {
            row["remembered"]: row["tokens_per_second"]
            for row in rows
            if (row["read"], row["by"]) == (read, by)
        }
        how = "fused kernels" if by == "kernels" else "plain PyTorch"
        body.append([READ[read], how, *(f"{speeds[each]:,}" for each in behind)])
    return table(["prefill", "by", *(f"behind {each:,} tokens" for each in behind)], body)


def decoding() -> str:
    """Returns microseconds of one decode step of one layer, beside dense attention."""
    body = []
    for row in results("decode")["rows"]:
        kernels_us = 1e3 * row["kernels_graph_ms"]
        dense_us = 1e3 * row["dense_graph_ms"]
        body.append(
            [
                f"{row['slots']:,}",
                f"{kernels_us:.1f}",
                f"{1e3 * row['layer_graph_ms']:.1f}",
                f"{dense_us:.0f}",
                f"{dense_us / kernels_us:.1f}",
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['least_bytes'] / 1e6:.1f}",
            ]
        )
    head = ["slots", "two kernels", "a layer", "dense", "dense / kernels"]
    return table([*head, "MB asked for", "MB at least"], body)


def whole_models() -> str:
    """Returns the time of a token inside ``generate``, of every model and tier."""
    body = []
    for row in (row for part in GENERATE_PARTS for row in results(f"generate-{part}")["rows"]):
        who = "stock" if row["attention"] == "stock" else f"landmark, {row['tier']}"
        who += f", {row['files']} files" if row.get("files") else ""
        moved = ["", ""]
        if row.get("tier") in ("host", "disk"):
            moved = [
                f"{100 * row['hit_rate']:.0f} %",
                f"{(row['host_bytes'] + row['disk_bytes']) / 1e6:.1f}",
            ]
        held = f"{row['device_bytes'] / 2**20:,.0f}" if "device_bytes" in row else ""
        speed = [f"{row['ms']:.1f}", f"{row['tokens_per_second']:.0f}"]
        body.append([row["model"], f"{row['tokens']:,}", who, *speed, *moved, held])
    head = ["model", "tokens behind", "attention, tier", "ms a token", "tokens a second"]
    return table([*head, "hits", "MB fetched a token", "MiB on the device"], body)


def ten_million() -> str:
    """Returns one memory of ten million tokens on tier ``host``."""
    found = results("millions")
    (row,) = found["rows"]
    read = row["after_reading"]
    tenth = row["after_a_tenth"]
    decode = row["decode"]
    first, *others = (f"{each['tokens_per_second']:,}" for each in row["single"])
    hits = decode["hits_per_token"] / (decode["hits_per_token"] + decode["misses_per_token"])
    body = [
        [
            "read",
            f"{row['tokens']:,} tokens of {row['data_tokens']:,}, {row['tokens_per_second']:,} a "
            f"second; {first}, {' and '.join(others)} in the further readings, whose host memory "
            "was pinned already",
        ],
        [
            "in host memory",
            f"{read['host_tier_bytes'] / 1e9:.1f} GB of blocks, "
            f"{read['resident_bytes'] / 1e9:.1f} GB resident",
        ],
        [
            "on the device",
            f"{read['device_bytes'] / 1e6:,.0f} MB, {read['landmark_bytes'] / 1e6:,.0f} of them "
            f"landmark keys; without these {read['device_bytes_but_landmarks'] / 1e6:.0f} MB, "
            f"after a tenth of the text {tenth['device_bytes_but_landmarks'] / 1e6:.0f}",
        ],
        [
            "a token of `generate`",
            f"{decode['ms_per_token']:.1f} ms, {decode['fetched_host_per_token'] / 1e6:.2f} MB "
            f"fetched, {hits:.0%} hits".replace("%", " %"),
        ],
        [f"named codes, {row['named']['asked']} in one reading", f"{row['named']['right']} right"],
        [f"single pass key, {len(row['single'])} readings", f"{row['single_right']} right"],
    ]
    return table([f"one {found['versions']['device']}", ""], body)


def millions_on_disk() -> str:
    """Returns one memory of some million tokens on tier ``disk``."""
    (row,) = results("millions_disk")["rows"]
    read = row["after_reading"]
    decode = row["decode"]
    hits = decode["hits_per_token"] / (decode["hits_per_token"] + decode["misses_per_token"])
    body = [
        ["read", f"{row['tokens']:,} tokens, {row['tokens_per_second']:,} a second"],
        ["on disk", f"{read['disk_tier_bytes'] / 1e9:.1f} GB of blocks"],
        [
            "resident",
            f"{read['resident_bytes'] / 1e9:.2f} GB after reading, "
            f"{read['landmark_bytes'] / 1e9:.2f} of them landmark keys; "
            f"{row['after_a_tenth']['resident_bytes'] / 1e9:.2f} after a tenth of the text, "
            f"{row['after']['resident_bytes'] / 1e9:.2f} after the questions",
        ],
        [
            "a token of `generate`",
            f"{decode['ms_per_token']:.0f} ms, {decode['fetched_disk_per_token'] / 1e6:.2f} MB "
            f"fetched, {hits:.0%} hits".replace("%", " %"),
        ],
        [f"named codes, {row['named']['asked']} in one reading", f"{row['named']['right']} right"],
    ]
    return table(["2 CPU cores, one disk", ""], body)


def archive() -> str:
    """Returns times and sizes of an archive, as ``archive.py`` found them."""
    (row,) = results("archive")["rows"]
    saved = row["saved"]
    opened = row["opened"]
    more = (opened["resident_bytes"] - opened["resident_bytes_before"]) / 2**20
    body = [
        [
            "read without retrieval",
            f"{saved['tokens_per_second']:,} tokens a second",
            f"{saved['read_peak_bytes'] / 2**30:.2f} GiB resident at most",
        ],
        ["asked for the key", f"{saved['asked']['seconds']:.2f} s, right", ""],
        [
            "saved",
            f"{saved['save_seconds']:.0f} s, {saved['bytes'] / 1e9:.1f} GB",
            f"{saved['peak_bytes'] / 2**30:.2f} GiB resident at most",
        ],
        [
            "opened by another process",
            f"{opened['open_seconds']:.2f} s",
            f"{more:.0f} MiB more than before, half of it landmark keys",
        ],
        [
            "asked for the key",
            f"{opened['asked']['seconds']:.2f} s, the same answer, the same logits bit for bit",
            "",
        ],
        [
            f"{opened['appended']['tokens']:,} tokens with a code appended, saved",
            f"{opened['appended']['save_seconds']:.2f} s for saving",
            "",
        ],
        ["opened, asked for the key and for the code", "both right", ""],
    ]
    return table([f"{row['tokens']:,} tokens", "", ""], body)


def eviction() -> str:
    """Returns the time to append a block after many others were dropped."""
    rows = results("eviction")["rows"]
    head = ["blocks appended before", *(f"{row['blocks']:,}" for row in rows)]
    return table(head, [["µs a block", *(f"{row['microseconds']:.0f}" for row in rows)]])


def against_full_attention() -> str:
    """Returns README's table of landmarks beside full attention."""
    body = [
        _passkeys_beside_full(512, "the shortest rows of training"),
        _passkeys_beside_full(32_768, "twice the longest rows of training"),
        _perplexity_beside_full(512),
        _perplexity_beside_full(4_096),
        _decoding_beside_full(),
        *_generating_beside_full(),
        _small_cache_beside_full(),
        _kernel_beside_full(),
        _step_beside_full(),
    ]
    return table(["", "landmarks", "full attention", "better", "measured by"], body)


def _passkeys_beside_full(length: int, what: str) -> list[str]:
    rows = [row for row in figures() if row.get("task") == "passkey" and row["length"] == length]
    ours = [
        row
        for row in rows
        if row["model"] == "landmark"
        and (row["top_k"], row["granularity"], row["read"]) == (2, "token_head", "retrieve")
    ]
    full = [row for row in rows if row["attention"] == "full"]
    return [
        f"pass keys found in {length:,} tokens ({what})",
        _found(ours),
        _found(full),
        _better(_share(ours), _share(full)),
        PASSKEY.format("MODEL"),
    ]


def _found(rows: list[dict[str, Any]]) -> str:
    return f"{sum(row['correct'] for row in rows)}/{sum(row['asked'] for row in rows)}"


def _share(rows: list[dict[str, Any]]) -> float:
    return float(sum(row["correct"] for row in rows) / sum(row["asked"] for row in rows))


def _better(ours: float, others: float, *, lower: bool = False) -> str:
    if ours == others:
        return "equal"
    return "landmarks" if (ours < others) == lower else "full attention"


def _perplexity_beside_full(length: int) -> list[str]:
    rows = [row for row in figures() if "perplexity" in row and row["length"] == length]
    (full,) = (row for row in rows if row["attention"] == "full")
    (ours,) = (
        row
        for row in rows
        if row["attention"] == "landmark" and row["scheme"] == "blocks" and row["top_k"] == 4
    )
    return [
        f"perplexity of held-out books, {length:,} tokens at a time",
        f"{ours['perplexity']:.2f}",
        f"{full['perplexity']:.2f}",
        _better(ours["perplexity"], full["perplexity"], lower=True),
        PERPLEXITY,
    ]


def _decoding_beside_full() -> list[str]:
    row = results("decode")["rows"][-1]
    ours = 1e3 * row["kernels_graph_ms"]
    dense = 1e3 * row["dense_graph_ms"]
    return [
        f"one layer's attention of one token behind {row['slots']:,}",
        f"{ours:.0f} µs",
        f"{dense:.0f} µs",
        _better(ours, dense, lower=True),
        SCRIPT.format("decode"),
    ]


def _generating_beside_full() -> list[list[str]]:
    rows = [row for row in results("generate-large")["rows"] if row["tokens"] == 524_288]
    (ours,) = (row for row in rows if row["attention"] == "landmark")
    (full,) = (row for row in rows if row["attention"] == "stock")
    return [
        [
            f"8B shape behind {ours['tokens']:,} tokens, blocks in host memory: GPU memory of its "
            "cache",
            f"{ours['device_bytes'] / 1e9:.1f} GB",
            f"{full['device_bytes'] / 1e9:.0f} GB",
            _better(ours["device_bytes"], full["device_bytes"], lower=True),
            GENERATE,
        ],
    ]


def _small_cache_beside_full() -> list[str]:
    rows = [row for row in results("generate-large")["rows"] if row["tokens"] == 32_768]
    (ours,) = (row for row in rows if row.get("tier") == "device")
    (full,) = (row for row in rows if row["attention"] == "stock")
    return [
        f"8B shape behind {ours['tokens']:,} tokens, all on the GPU: memory of its cache",
        f"{ours['device_bytes'] / 1e9:.1f} GB",
        f"{full['device_bytes'] / 1e9:.1f} GB",
        _better(ours["device_bytes"], full["device_bytes"], lower=True),
        GENERATE,
    ]


def _kernel_beside_full() -> list[str]:
    rows = [row for row in results("ops")["rows"] if row["case"] == "dense-65536"]
    name = "forward_backward_tflops"
    (ours,) = (row[name] for row in rows if row["peer"] == "landmark")
    (full,) = (row[name] for row in rows if row["peer"] == "cudnn")
    return [
        "training kernels, 65,536 keys, every block read: TFLOP/s (cuDNN)",
        f"{ours:.0f}",
        f"{full:.0f}",
        _better(ours, full),
        SCRIPT.format("ops"),
    ]


def _step_beside_full() -> list[str]:
    steps = results("step")["steps"]
    ours = steps["landmark"]["milliseconds"]
    full = steps["stock, cuDNN"]["milliseconds"]
    return [
        "one training step, 1.2B parameters, 8,192 positions",
        f"{ours:.0f} ms",
        f"{full:.0f} ms",
        _better(ours, full, lower=True),
        SCRIPT.format("step"),
    ]


def against_retrieval() -> str:
    """Returns README's table of landmarks beside a search for text passages."""
    rows = [row for row in results("rank-books")["rows"] if row["text"] == "cut"]
    (ours,) = (row for row in rows if row["ranker"] == "landmark")
    (bm25,) = (row for row in rows if row["ranker"] == "bm25")
    body = [
        [
            f"book of a passage found first, among {ours['documents']}",
            f"{ours['recall_at_1']:.1%}",
            f"{bm25['recall_at_1']:.1%}",
            RANK,
        ],
    ]
    (fact,) = (
        row
        for row in figures()
        if row.get("task") == "facts" and (row["length"], row["facts"]) == (8_192, 64)
    )
    (millions,) = results("millions")["rows"]
    named = millions["named"]
    held = millions["after_reading"]["host_tier_bytes"]
    body += [
        [
            "64 named codes in one text of 8,192 tokens, each asked for: right",
            f"{fact['accuracy']:.0%}",
            "not measured",
            FACTS,
        ],
        [
            f"{named['asked']} named codes in one text of {millions['tokens']:,} tokens: right",
            f"{named['right']} of {named['asked']}",
            "not measured",
            SCRIPT.format("millions"),
        ],
        [
            "kept for each token of a text",
            f"{held / millions['tokens'] / 1e3:.1f} KB",
            "the text, an index",
            SCRIPT.format("millions"),
        ],
    ]
    return table(["", "landmarks", "passages by BM25", "measured by"], body)


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


def versions_line(figures: dict[str, Any]) -> str:
    """Returns what the figures were measured with."""
    return ", ".join(f"{key} {value}" for key, value in figures["versions"].items() if value)


def table(head: list[str], body: list[list[Any]]) -> str:
    """Returns a Markdown table; nothing for ``None``."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(
        "| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |"
        for line in lines
    )


TABLES: dict[str, Callable[[], str]] = {
    "passkey": passkey_summary,
    "facts": facts_summary,
    "recall": recall_summary,
    "perplexity": perplexity_summary,
    "kernels": kernels,
    "reading": reading,
    "decoding": decoding,
    "whole-models": whole_models,
    "ten-million": ten_million,
    "millions-on-disk": millions_on_disk,
    "archive": archive,
    "eviction": eviction,
    "against-full-attention": against_full_attention,
    "against-retrieval": against_retrieval,
}

if __name__ == "__main__":
    main()
