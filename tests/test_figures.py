"""The tables of README, docs/ and the model cards say what was recorded, and nothing else."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import model_cards  # noqa: E402
import tables  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))  # its ops.py is not tests/ops

CARDS = model_cards.pages()
PAGES = tables.pages()
PARTS = ("small", "large", "real", "replayed")


@pytest.mark.parametrize("path", CARDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_card_is_made_from_the_recorded_figures(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == CARDS[path], "run python benchmarks/model_cards.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page_is_made_from_the_recorded_figures(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path], "run python benchmarks/tables.py"


def test_every_table_is_on_a_page() -> None:
    found = {}
    for path in PAGES:
        for name, table in re.findall(
            r"<!-- figures: ([\w-]+) -->(.*?)<!-- end: \1 -->", path.read_text("utf-8"), re.S
        ):
            found[name] = table
    assert set(found) == set(tables.TABLES)
    for name in ("passkey", "facts", "perplexity", "kernels"):
        assert found[name].count("|") > 20
    assert all(table.count("|") > 8 for table in found.values())


def test_the_table_of_archives() -> None:
    (row,) = json.loads(
        (ROOT / "benchmarks" / "results" / "archive.json").read_text(encoding="utf-8")
    )["rows"]
    saved = row["saved"]
    opened = row["opened"]
    both = row["opened"]["appended"]["asked"]
    page = page_of("millions")
    head = f"| {row['tokens']:,} tokens |  |  |\n"
    found = [
        line.strip("|").split("|") for line in page.split(head)[1].split("\n\n")[0].splitlines()[1:]
    ]
    more = (opened["resident_bytes"] - opened["resident_bytes_before"]) / 2**20
    assert saved["asked"]["right"] and saved["asked"]["logits"] == opened["asked"]["logits"]
    assert all(each["right"] for each in both)
    for line, said in zip(
        found,
        (
            (
                f"{saved['tokens_per_second']:,} tokens a second",
                f"{saved['read_peak_bytes'] / 2**30:.2f} GiB",
            ),
            (f"{saved['asked']['seconds']:.2f} s, right",),
            (
                f"{saved['save_seconds']:.0f} s, {saved['bytes'] / 1e9:.1f} GB",
                f"{saved['peak_bytes'] / 2**30:.2f} GiB",
            ),
            (f"{opened['open_seconds']:.2f} s", f"{more:.0f} MiB more"),
            (f"{opened['asked']['seconds']:.2f} s, the same answer, the same logits bit for bit",),
            (f"{opened['appended']['save_seconds']:.2f} s",),
            ("both right",),
        ),
        strict=True,
    ):
        assert all(
            cell.strip().startswith(each) for cell, each in zip(line[1:], said, strict=False)
        ), line


def page_of(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def recorded(name: str) -> dict:
    return json.loads(
        (ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8")
    )


def test_the_table_of_decoding() -> None:
    for row in recorded("decode")["rows"]:
        kernels, layer, dense = (
            1e3 * row[f"{name}_graph_ms"] for name in ("kernels", "layer", "dense")
        )
        cells = (
            f"{row['slots']:,}",
            f"{kernels:.1f}",
            f"{layer:.1f}",
            f"{dense:.0f}",
            f"{dense / kernels:.1f}",
        )
        bytes_read = (f"{row[name] / 1e6:.1f}" for name in ("bytes", "least_bytes"))
        assert f"| {' | '.join((*cells, *bytes_read))} |" in page_of("benchmarks")


def test_readme_quotes_decoding() -> None:
    row = recorded("decode")["rows"][-1]
    kernels, dense = (1e3 * row[f"{name}_graph_ms"] for name in ("kernels", "dense"))
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"behind {row['slots']:,} | {kernels:.0f} µs | {dense:.0f} µs |" in page


def test_the_table_of_whole_models() -> None:
    rows = [row for part in PARTS for row in recorded(f"generate-{part}")["rows"]]
    lines = [
        line
        for line in page_of("benchmarks").splitlines()
        if line.startswith(("| 1B", "| 8B", "| bundled"))
    ]
    assert len(lines) == len(rows) > 10
    for line, row in zip(lines, rows, strict=True):
        who = "stock" if row["attention"] == "stock" else f"landmark, {row['tier']}"
        who += f", {row['files']} files" if row.get("files") else ""
        cells = [
            row["model"],
            f"{row['tokens']:,}",
            who,
            f"{row['ms']:.1f}",
            f"{row['tokens_per_second']:.0f}",
        ]
        if row.get("tier") in ("host", "disk"):
            cells += [
                f"{100 * row['hit_rate']:.0f} %",
                f"{(row['host_bytes'] + row['disk_bytes']) / 1e6:.1f}",
            ]
        assert line.startswith(f"| {' | '.join(cells)} |")
        if "device_bytes" in row:
            assert line.endswith(f"| {row['device_bytes'] / 2**20:,.0f} |")


def test_the_table_of_ten_million_tokens() -> None:
    (row,) = recorded("millions")["rows"]
    read = row["after_reading"]
    tenth = row["after_a_tenth"]
    decode = row["decode"]
    first, *rest = (f"{each['tokens_per_second']:,}" for each in row["single"])
    for said in (
        f"{row['tokens']:,} tokens of {row['data_tokens']:,}, {row['tokens_per_second']:,} a "
        f"second; {first}, ",
        f"{read['host_tier_bytes'] / 1e9:.1f} GB of blocks, {read['resident_bytes'] / 1e9:.1f} GB "
        "resident",
        f"{read['device_bytes'] / 1e6:,.0f} MB, {read['landmark_bytes'] / 1e6:,.0f} of them "
        "landmark keys",
        f"without these {read['device_bytes_but_landmarks'] / 1e6:.0f} MB",
        f"after a tenth of the text {tenth['device_bytes_but_landmarks'] / 1e6:.0f} |",
        f"{decode['ms_per_token']:.1f} ms, {decode['fetched_host_per_token'] / 1e6:.2f} MB fetched",
        f"| {row['named']['right']} right |",
        f"| {row['single_right']} right |",
        *rest,
    ):
        assert said in page_of("millions")


def test_the_table_of_what_lies_on_disk() -> None:
    (row,) = recorded("millions_disk")["rows"]
    read = row["after_reading"]
    decode = row["decode"]
    tenth, asked = (row[name]["resident_bytes"] / 1e9 for name in ("after_a_tenth", "after"))
    for said in (
        f"{row['tokens']:,} tokens, {row['tokens_per_second']:,} a second |",
        f"{read['disk_tier_bytes'] / 1e9:.1f} GB of blocks |",
        f"{read['resident_bytes'] / 1e9:.2f} GB after reading, {read['landmark_bytes'] / 1e9:.2f} "
        "of them landmark",
        f"{tenth:.2f} after a tenth of the text, {asked:.2f} after the questions",
        f"{decode['ms_per_token']:.0f} ms, {decode['fetched_disk_per_token'] / 1e6:.2f} MB fetched",
        f"| {row['named']['right']} right |",
    ):
        assert said in page_of("millions")


def test_pages_quote_whole_models_and_ten_million_tokens() -> None:
    page = " ".join((page_of("benchmarks") + page_of("results")).split())
    stock, ours = (
        next(
            row
            for row in recorded("generate-large")["rows"]
            if row["tokens"] == 524_288 and row["attention"] == attention
        )
        for attention in ("stock", "landmark")
    )
    (row,) = recorded("millions")["rows"]
    held = row["after_reading"]
    decode = row["decode"]
    for said in (
        f"writes {ours['tokens_per_second']:.0f} tokens a second and takes "
        f"{ours['device_bytes'] / 1e9:.1f} GB",
        f"a dense cache of {stock['device_bytes'] / 1e9:.0f} GB, writes "
        f"{stock['tokens_per_second']:.0f}.",
        f"{held['host_tier_bytes'] / 1e9:.0f} GB of the CPU's and "
        f"{held['device_bytes'] / 1e9:.1f} GB of the GPU's",
        f"{row['tokens_per_second'] // 1000},000 tokens a second, {decode['ms_per_token']:.1f} ms "
        "a token",
        f"{row['single_right']} of {len(row['single'])} pass keys",
        f"{row['named']['right']} of {row['named']['asked']} named codes",
    ):
        assert said in page


def test_the_table_of_ranking_begins_with_what_was_recorded() -> None:
    ours, bm25 = (
        next(
            row
            for row in recorded("rank-books")["rows"]
            if (row["ranker"], row["text"]) == (ranker, "cut")
        )
        for ranker in ("landmark", "bm25")
    )
    cells = [f"{row['recall_at_1']:.1%} | {row['ndcg_at_10']:.3f}" for row in (ours, bm25)]
    assert f"| books | cut | {' | '.join(cells)} | " in page_of("evaluation")


def test_readme_quotes_named_codes() -> None:
    (share,) = (
        row["accuracy"]
        for row in tables.figures()
        if row.get("task") == "facts" and (row["length"], row["facts"]) == (8192, 64)
    )
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"of 64 named codes it tells {100 * share:.0f} %" in page


def test_readme_quotes_the_window() -> None:
    rows = [row for row in tables.figures() if row["attention"] == "window"]
    (perplexity,) = (
        row["perplexity"]
        for row in rows
        if row.get("length") == 4096 and row.get("attention_size") == 448
    )
    keys = [row for row in rows if row.get("task") == "passkey" and row["length"] == 32_768]
    found = sum(row["correct"] for row in keys)
    asked = sum(row["asked"] for row in keys)
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"({perplexity:.2f} at 4,096 tokens), but finds {found} of {asked} keys in 32,768" in page
    )
