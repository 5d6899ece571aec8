"""What is measured of the landmark SmolLM2, beside the stock model that it was made of.

    python benchmarks/bundle_adapter.py --unpack out/stock
    python benchmarks/smollm2.py --squad FILE --hotpot FILE --paragraphs FILE --out out/questions
    python recipes/smollm2_data.py --fairytale FILE --out out/questions
    python recipes/smollm2_data.py --prompts 200 --seed 2 --base out/stock --out out/questions

The first writes the stock model, the others what is asked, none of which it was trained on: SQuAD's
first four articles of the dev file, HotpotQA's first 500 questions, each among further paragraphs
of HotpotQA (``--paragraphs``, a JSON list of texts); questions about FairytaleQA's stories; prompts
that the stock model writes. bAbI's tests are read as they are. The commands that measure are
printed, the arguments of Python for each result. The dense twin is the stock model tuned alike:

    landmark train --plain --model out/stock --config recipes/smollm2.json --lora 32 --data books \\
        --out out/dense
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ARTICLES = 4
HOTPOT_QUESTIONS = 500
EVAL = "-m landmark.cli.app eval"
FILLERS = {"paper": "paper", "books": "{data}/test", "pydoc": "pydoc"}
EVERY_FILLER = f"--filler {','.join(FILLERS.values())}"
PASSKEY = f"{EVAL} passkey --model smollm2 --trials 50 --read retrieve"
STOCK_PASSKEY = f"{EVAL} passkey --model {{stock}} --trials 50 {EVERY_FILLER}"
# Texts are filled up with further paragraphs first, then with books.
ASKED = f"{EVAL} questions --data {{questions}}/{{set}}.jsonl --filler {{data}}/test"
HAYSTACK = f"{ASKED} --contexts haystack"
SETS = ("squad", "hotpot")
SHORT = "--lengths 4096,32768"
LONG = "--lengths 131072,1048576"
YARDSTICKS = "evidence,block_mass,mean_key,latest,random"
BABI = range(1, 6)


def commands() -> dict[str, str]:
    """Returns the arguments of Python for each result.

    ``{data}``, ``{questions}`` and ``{babi}`` stand for the folders of texts, of what is asked, and
    of bAbI's stories; ``{stock}`` and ``{dense}`` for those of the two plain models.
    """
    found = {}
    for name, filler in FILLERS.items():
        found[f"smollm2-passkey-{name}"] = (
            f"{PASSKEY} --filler {filler} --lengths 2048,8192,32768,131072"
        )
    found["smollm2-million"] = (
        f"{EVAL} passkey --model smollm2 --lengths 1048576 --trials 20 --filler {{data}}/test "
        "--read local"
    )
    found["smollm2-facts"] = (
        f"{EVAL} passkey --model smollm2 --trials 25 --read retrieve --filler {{data}}/test "
        "--facts 16 --lengths 32768"
    )
    found["smollm2-passkey-stock"] = f"{STOCK_PASSKEY} --lengths 2048,8192,32768"
    for dtype in ("bfloat16", "float32"):
        found[f"smollm2-agreement-{dtype}"] = (
            f"{EVAL} agreement --data {{questions}}/prompts.jsonl --reference {{stock}} "
            f"--reference-dtype float32 --model {{stock}} --dtype {dtype}"
        )
    found["smollm2-agreement"] = (
        f"{EVAL} agreement --data {{questions}}/prompts.jsonl --reference {{stock}} --model smollm2"
    )
    for task in BABI:
        found[f"smollm2-babi-{task}"] = (
            f"{EVAL} questions --data {{babi}}/qa{task}_*_test.txt --model smollm2 "
            "--compare {stock} --contexts evidence"
        )
    for each in SETS:
        found |= {name: words.replace("{set}", each) for name, words in _asked(each).items()}
    found["smollm2-fairytale"] = (
        f"{HAYSTACK.replace('{set}', 'fairytale')} --model smollm2 --lengths 32768"
    )
    return found


def _asked(name: str) -> dict[str, str]:
    """Returns the results of one set of questions."""
    return {
        f"smollm2-{name}-alone": (
            f"{ASKED} --contexts evidence,nothing,bm25 --model smollm2 --compare {{stock}}"
        ),
        f"smollm2-{name}-hidden": f"{HAYSTACK} {SHORT} --model smollm2",
        f"smollm2-{name}-long": f"{HAYSTACK} {LONG} --model smollm2",
        f"smollm2-{name}-yardsticks": (
            f"{HAYSTACK} {SHORT} --model smollm2 --granularity {YARDSTICKS}"
        ),
        f"smollm2-{name}-densely": (
            f"{HAYSTACK} --lengths 4096,8000 --model smollm2 --dense true --compare {{dense}}"
        ),
        f"smollm2-{name}-stock": f"{HAYSTACK} --lengths 4096,8000 --model {{stock}}",
        f"smollm2-{name}-yarn": f"{HAYSTACK} {SHORT} --model {{stock}} --rope yarn:4",
    }


def main() -> None:
    """Writes what is asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--squad", type=Path, required=True, help="SQuAD's dev file")
    parser.add_argument("--hotpot", type=Path, required=True, help="HotpotQA's dev file")
    parser.add_argument("--paragraphs", type=Path, required=True, help="texts to stand among")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    others = {"documents": _read(options.paragraphs), "questions": [], "answers": []}
    articles = _read(options.squad)["data"][:ARTICLES]
    sets = {
        "squad": [{"data": [article]} for article in articles],
        "hotpot": _read(options.hotpot)[:HOTPOT_QUESTIONS],
    }
    for name, rows in sets.items():
        path = options.out / f"{name}.jsonl"
        lines = [json.dumps(row) + "\n" for row in [*rows, others]]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(rows)} sets, {len(others['documents']):,} further paragraphs")
    for name, command in commands().items():
        print(f"{name}: {command}")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
