"""Makes the question sets and conversations that the landmark SmolLM2 is trained on.

    python recipes/smollm2_data.py --fairytale FILE --boolq FILE --p3 FOLDER --out data
    python recipes/smollm2_data.py --prompts 6000 --base SmolLM2-135M-Instruct --out data

SQuAD and HotpotQA are read by `landmark train` as they are. The others become rows that it reads:

    fairytale.jsonl  paragraphs of a story, and the questions whose answer stands in one of them
    boolq.jsonl      a passage, and a question that is answered by yes or no
    reading.jsonl    prompts and completions of P3 that are about a text in the prompt
    prompts.jsonl    what users might ask, written by the given model itself; a teacher answers it

FairytaleQA is Apache-2.0, BoolQ CC BY-SA 3.0; of P3 (Apache-2.0) only templates of the sets in
``READING`` are taken, all of which are under CC BY, CC BY-SA or MIT.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

READING = ("adversarial_qa", "duorc", "quoref", "ropes")
LONGEST_PROMPT = 6_000  # characters
PROMPT_TOKENS = 96
BATCH = 256

Row = dict[str, Any]


def main() -> None:
    """Writes one file for each source that is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fairytale", type=Path, help="stories with questions, JSON Lines")
    parser.add_argument("--boolq", type=Path, help="passages with questions, JSON Lines")
    parser.add_argument("--p3", type=Path, help="folder with a file for each template")
    parser.add_argument("--prompts", type=int, default=0, help="prompts that --base writes")
    parser.add_argument("--base", help="an instruct model, folder or hub name")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    made = {}
    if options.fairytale:
        made["fairytale"] = list(fairytale(options.fairytale))
    if options.boolq:
        made["boolq"] = list(boolq(options.boolq))
    if options.p3:
        made["reading"] = list(reading(options.p3, options.seed))
    if options.prompts:
        made["prompts"] = prompts(options.base, options.prompts, options.seed)
    for name, rows in made.items():
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows):,} rows")


def fairytale(path: Path) -> Iterator[Row]:
    """Yields each story's paragraphs with the questions that a paragraph answers in its words.

    A question names the section that answers it, by its number alone, so of several places where
    the answer stands the one nearest to that share of the story counts.
    """
    for story in lines_of(path):
        paragraphs = [line for line in story["text"].split("\n") if line.strip()]
        total = sum(map(len, paragraphs))
        row: Row = {"documents": paragraphs, "questions": [], "answers": [], "evidence": []}
        for asked in story["qas"]:
            answer = asked["answers"][0].strip().rstrip(".")
            expected = (int(asked["section"].split(",")[0]) - 0.5) / story["sections"] * total
            places = occurrences(paragraphs, answer)
            if asked["explicit"] == "explicit" and places:
                _, number, begin = min(places, key=lambda place: abs(place[0] - expected))
                row["questions"].append(asked["question"])
                row["answers"].append(answer)
                row["evidence"].append([[number, begin, begin + len(answer)]])
        yield row


def occurrences(paragraphs: list[str], answer: str) -> list[tuple[int, int, int]]:
    """Returns where an answer stands as whole words: characters before it, paragraph, character."""
    pattern = re.compile(rf"\b{re.escape(answer)}\b", re.IGNORECASE)
    found = []
    before = 0
    for number, paragraph in enumerate(paragraphs):
        found += [
            (before + match.start(), number, match.start())
            for match in pattern.finditer(paragraph)
            if match.end() > match.start()
        ]
        before += len(paragraph)
    return found


def boolq(path: Path) -> Iterator[Row]:
    """Yields each passage with its question; the whole passage is the evidence."""
    for row in lines_of(path):
        passage = f"{row['title']}\n{row['passage']}"
        question = row["question"].strip()
        yield {
            "documents": [passage],
            "questions": [f"{question[:1].upper()}{question[1:]}?"],
            "answers": ["Yes" if row["answer"] else "No"],
            "evidence": [[[0, 0, len(passage)]]],
        }


def reading(folder: Path, seed: int) -> list[Row]:
    """Returns prompts about a text with their completions, in a random order."""
    rows = [
        {"prompt": row["prompt"].strip(), "completion": row["completion"].strip()}
        for path in sorted(folder.glob("*.jsonl"))
        if path.name.startswith(READING)
        for row in lines_of(path)
        if len(row["prompt"]) <= LONGEST_PROMPT and row["completion"].strip()
    ]
    random.Random(seed).shuffle(rows)
    return rows


def prompts(base: str, count: int, seed: int) -> list[Row]:
    """Returns what an instruct model writes where a user's message begins, each once.

    The method is that of Magpie (Xu et al., arXiv 2406.08464): the chat template is given up to the
    opening of the user's turn, and the model goes on.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device)
    mark = "\0"
    conversation = [{"role": "user", "content": mark}]
    opening = tokenizer.apply_chat_template(conversation, tokenize=False).split(mark)[0]
    ids = tokenizer(opening, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
    torch.manual_seed(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        written = model.generate(
            ids.expand(min(BATCH, count), -1),
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            max_new_tokens=PROMPT_TOKENS,
            pad_token_id=tokenizer.eos_token_id,
        )[:, ids.shape[1] :]
        for row in written.tolist():
            if tokenizer.eos_token_id in row:  # others were cut
                text = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]).strip()
                if text:
                    found[text] = None
    return [{"messages": [{"role": "user", "content": text}]} for text in list(found)[:count]]


def lines_of(path: Path) -> Iterator[Row]:
    """Yields the objects of a file of JSON Lines."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


if __name__ == "__main__":
    main()
