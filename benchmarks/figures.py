"""Measures every figure of the bundled models, merges the rows, writes cards and tables.

    python benchmarks/figures.py --data books --tuned out/tuned --jobs 6

Each measurement is a `landmark eval` command, printed before it runs; its rows go to a file of its
own in --out, as far as it came. Rows that were measured replace those recorded before; the others
stay if they were measured with the same versions and commit, or with --keep, and then the label
names both. Times of several measurements at once are no speeds: ``versions`` says how many there
were.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import model_cards
import tables

FIGURES = model_cards.BUNDLED / "landmark" / "figures.json"
TIMES = ("seconds", "peak_bytes")


def commands(data: str, tuned: str | None) -> dict[str, list[str]]:
    """Returns the measurements by name, the longest first."""
    books = f"{data}/test"
    fillers = {"paper": "paper", "books": books, "pydoc": "pydoc"}
    every = ["--filler", ",".join(fillers.values())]
    passkey = ["passkey", "--trials", "50", "--read", "retrieve"]
    plain = [
        "passkey",
        "--trials",
        "50",
        *every,
        "--model",
        "twin",
        "--lengths",
        "512,2048,8192,32768",
    ]
    perplexity = [
        "perplexity",
        "--data",
        data,
        "--lengths",
        "512,2048,4096",
        "--max-tokens",
        "524288",
    ]
    alone = [*perplexity, "--compare", "twin"]
    million = ["passkey", "--lengths", "1048576", "--trials"]
    facts = [
        "passkey",
        "--filler",
        books,
        "--facts",
        "1,2,4,8,16,64",
        "--trials",
        "25",
        "--read",
        "retrieve",
    ]
    found = {}
    for name, filler in fillers.items():
        for k in ("2", "4"):
            asked = ["--top-k", k, "--filler", filler]
            found[f"passkey-128k-{name}-{k}"] = [*passkey, "--lengths", "131072", *asked]
            found[f"passkey-1m-{name}-{k}"] = [*million, "20", *asked, "--read", "local"]
    found |= {
        "passkey-1m-retrieve": [
            *million,
            "5",
            "--filler",
            books,
            "--top-k",
            "4",
            "--read",
            "retrieve",
        ],
        "passkey": [*passkey, *every, "--lengths", "512,8192,32768", "--top-k", "2,4"],
        "granularity": [
            *passkey,
            *every,
            "--lengths",
            "32768",
            "--granularity",
            "head,group,token",
        ],
        "facts": [*facts, "--lengths", "8192,32768"],
        "twin": [*plain, "--window", "384"],
        "twin-dynamic": [*plain, "--rope", "dynamic:2"],
        "perplexity-190": [*alone, "--local", "190", "--top-k", "2,0", "--window", "320"],
        "perplexity-paper": [
            *alone,
            "--local",
            "250,350",
            "--blocks",
            "40",
            "--top-k",
            "0,2,4",
            "--window",
            "448",
        ],
        "perplexity-blocks": [
            *alone,
            "--scheme",
            "blocks",
            "--top-k",
            "0,1,2,3,4,8",
            "--window",
            "384",
        ],
    }
    if tuned:
        found["tuned"] = [*found["passkey"], "--model", tuned]
    return found


def measure(name: str, words: list[str], out: Path) -> None:
    """Runs one command and keeps its output beside its rows."""
    line = [
        sys.executable,
        "-m",
        "landmark.cli.app",
        "eval",
        *words,
        "--out",
        str(out / f"{name}.json"),
    ]
    print("landmark eval " + " ".join(line[4:]), flush=True)
    start = time.perf_counter()
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        code = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    print(f"{name}: exit code {code} after {time.perf_counter() - start:.0f} s", flush=True)


def merge(out: Path, names: dict[str, str], jobs: int, commit: str | None, keep: bool) -> None:
    """Puts the rows of ``out`` into the recorded figures; ``names`` says what to call a path."""
    recorded: dict[str, Any] = {"versions": None, "rows": []}
    if FIGURES.exists():
        recorded = json.loads(FIGURES.read_text(encoding="utf-8"))
    rows = {what_was_asked(row): row for row in recorded["rows"]}
    for path in sorted(out.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        for name, shown in names.items():
            text = text.replace(json.dumps(name)[:-1], json.dumps(shown)[:-1])
        measured = json.loads(text)
        versions = {**measured["versions"], "measured at once": jobs}
        versions["commit"] = commit or versions["commit"]
        if keep and rows:
            before = recorded["versions"]
            versions = {key: _both(before.get(key), value) for key, value in versions.items()}
            recorded["versions"] = versions
        if versions != recorded["versions"]:
            print(
                f"{len(rows)} rows were measured with other versions and are dropped: "
                f"{recorded['versions']}"
            )
            recorded["versions"] = versions
            rows = {}
        rows.update({what_was_asked(row): row for row in measured["rows"]})
    lines = ",\n".join(json.dumps(row) for row in rows.values())
    FIGURES.write_text(
        f'{{"versions": {json.dumps(recorded["versions"])},\n"rows": [\n{lines}\n]}}\n',
        encoding="utf-8",
    )
    model_cards.main()
    tables.main()


def _both(old: Any, new: Any) -> Any:
    """Returns the one value, or both where they differ."""
    known = str(old).split(" or ") if old is not None else ["unknown"]
    return new if old == new else old if str(new) in known else " or ".join([*known, str(new)])


def what_was_asked(row: dict[str, Any]) -> str:
    """Returns a row without what it found, to tell a repeated measurement from another one."""
    found = (
        "accuracy",
        "correct",
        "asked",
        "depths",
        "perplexity",
        "loss",
        "beyond_trained",
        *TIMES,
    )
    return json.dumps(
        {key: value for key, value in row.items() if key not in found}, sort_keys=True
    )


def main() -> None:
    """Parses, measures, merges."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with test/*.txt, held out")
    parser.add_argument("--tuned", help="a fine-tuned model to be measured too")
    parser.add_argument("--out", type=Path, default=Path("out/figures"))
    parser.add_argument("--only", help="names of measurements, with commas")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="measurements at once: a small model does not fill a GPU",
    )
    parser.add_argument(
        "--commit", help="what was measured, where the code lies outside its repository"
    )
    parser.add_argument(
        "--merge-only", action="store_true", help="measure nothing, merge what lies in --out"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep rows of other versions, under a label that names both",
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.merge_only:
        chosen = commands(options.data, options.tuned)
        if options.only:
            chosen = {name: chosen[name] for name in options.only.split(",")}
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda item: measure(*item, options.out), chosen.items()))
    names = {options.data.rstrip("/"): "books"}
    merge(
        options.out,
        {**names, options.tuned: "tuned"} if options.tuned else names,
        options.jobs,
        options.commit,
        options.keep,
    )


if __name__ == "__main__":
    main()
