"""Makes the question sets and conversations that the landmark SmolLM2 is trained on.

    python recipes/smollm2_data.py --squad FILE --fairytale FILE --boolq FILE --p3 FOLDER --out data
    python recipes/smollm2_data.py --prompts 6000 --base SmolLM2-135M-Instruct --out data
    python recipes/smollm2_data.py --reversed squad.json data/fairytale.jsonl --out data
    python recipes/smollm2_data.py --ask-about hotpot.jsonl --base WRITER --out data

SQuAD and HotpotQA are read by `landmark train` as they are: `data/squad-train.json` is SQuAD's
training file, `data/hotpot.jsonl` HotpotQA's rows from 1,000 on. `--squad` is a part of SQuAD's dev
file, articles from 4 on; the last of these are put apart for choices between models. The others
become rows that training reads:

    squad.json, squad-val.json  articles to train on, and the last ``ARTICLES_APART``
    fairytale.jsonl  paragraphs of a story, and the questions whose answer stands in one of them
    boolq.jsonl      a passage, and a question that is answered by yes or no
    reading.jsonl    prompts and completions of P3 that are about a text in the prompt
    prompts.jsonl    what users might ask, written by the given model itself; a teacher answers it
    reversed.jsonl   a document and an answer in it, then the question: to train a writer of them
    written.jsonl    documents, and the questions that such a writer asks about names and numbers

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
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from landmark.data.questions import read_question_sets

READING = ("adversarial_qa", "duorc", "quoref", "ropes")
LONGEST_PROMPT = 6_000  # characters
WRITTEN_TOKENS = 96
BATCH = 256
END = "<|endoftext|>"  # of P3's completions; what ends an answer is the chat template's business
ASKED = 2  # questions about a document
ARTICLES_APART = 4  # of SQuAD
# A number, or a name that no sentence begins with.
ANSWER = re.compile(
    r"\b\d[\d,.]*\d\b|(?<=[a-z,] )[A-Z][\w'-]+(?: (?:of |the |de |and )?[A-Z][\w'-]+)*"
)

Row = dict[str, Any]


def main() -> None:
    """Writes one file for each source that is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--squad", type=Path, help="articles with questions, SQuAD JSON")
    parser.add_argument("--fairytale", type=Path, help="stories with questions, JSON Lines")
    parser.add_argument("--boolq", type=Path, help="passages with questions, JSON Lines")
    parser.add_argument("--p3", type=Path, help="folder with a file for each template")
    parser.add_argument("--prompts", type=int, default=0, help="prompts that --base writes")
    parser.add_argument("--base", help="an instruct model, folder or hub name")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reversed", nargs="+", default=[], help="documents with questions")
    parser.add_argument(
        "--ask-about", nargs="+", default=[], help="documents, with questions or not"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.squad:
        for name, articles in squad(options.squad).items():
            path = options.out / f"{name}.json"
            path.write_text(json.dumps({"data": articles}), encoding="utf-8")
            print(f"{path}: {len(articles):,} articles")
    made = {}
    if options.fairytale:
        made["fairytale"] = list(fairytale(options.fairytale))
    if options.boolq:
        made["boolq"] = list(boolq(options.boolq))
    if options.p3:
        made["reading"] = list(reading(options.p3, options.seed))
    if options.prompts:
        made["prompts"] = prompts(options.base, options.prompts, options.seed)
    if options.reversed:
        made["reversed"] = list(reversed_rows(options.reversed))
    if options.ask_about:
        made["written"] = written(options.ask_about, options.base, options.seed)
    for name, rows in made.items():
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows):,} rows")


def squad(path: Path) -> dict[str, list[Row]]:
    """Returns the articles to train on, and those put apart."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    return {"squad": articles[:-ARTICLES_APART], "squad-val": articles[-ARTICLES_APART:]}


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
        {"prompt": row["prompt"].strip(), "completion": completion}
        for path in sorted(folder.glob("*.jsonl"))
        if path.name.startswith(READING)
        for row in lines_of(path)
        if len(row["prompt"]) <= LONGEST_PROMPT
        and (completion := row["completion"].strip().removesuffix(END).rstrip())
    ]
    random.Random(seed).shuffle(rows)
    return rows


def reversed_rows(sources: list[str]) -> Iterator[Row]:
    """Yields each question with short evidence in one document as what its answer asks for."""
    for each in (each for source in sources for each in read_question_sets(source)):
        for asked in each.questions:
            document = each.documents[asked.evidence[0].document]
            if len(asked.evidence) == 1 and asked.answer in document:
                yield {"prompt": request(document, asked.answer), "completion": asked.question}


def request(document: str, answer: str) -> str:
    """Returns what a writer of questions is asked."""
    return f"{document}\n\nWrite a question about this text whose answer is: {answer}"


class Wanted(NamedTuple):
    """A question that is to be written.

    Attributes:
        row: where it goes.
        request: what the writer is asked.
        evidence: document, first character and the one after the last of the answer.
    """

    row: Row
    request: str
    evidence: list[int]


def written(sources: list[str], base: str, seed: int) -> list[Row]:
    """Returns documents with the questions that a model writes about names and numbers in them."""
    rng = random.Random(seed)
    rows = []
    wanted: list[Wanted] = []
    for each in (each for source in sources for each in read_question_sets(source)):
        row: Row = {"documents": list(each.documents), "questions": [], "answers": []}
        row["evidence"] = []
        rows.append(row)
        for number, document in enumerate(each.documents):
            places = [match.span() for match in ANSWER.finditer(document)]
            for begin, end in rng.sample(places, min(len(places), ASKED)):
                evidence = [number, begin, end]
                wanted.append(Wanted(row, request(document, document[begin:end]), evidence))
    writer = Writer(base, seed)
    questions = writer.answers([each.request for each in wanted])
    for each, question in zip(wanted, questions, strict=True):
        number, begin, end = each.evidence
        answer = each.row["documents"][number][begin:end]
        if question.endswith("?") and answer not in question:
            each.row["questions"].append(question)
            each.row["answers"].append(answer)
            each.row["evidence"].append([each.evidence])
    return [row for row in rows if row["questions"]]


class Writer:
    """An instruct model that writes many texts at once.

    Args:
        base: folder or hub name.
        seed: of what is sampled.
    """

    def __init__(self, base: str, seed: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(self.device)
        torch.manual_seed(seed)

    def answers(self, asked: list[str]) -> list[str]:
        """Returns the most probable answer to each message; an empty one where it was cut."""
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in asked
        ]
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        found = [""] * len(texts)
        for begin in range(0, len(order), BATCH):
            batch = order[begin : begin + BATCH]
            given = [texts[number] for number in batch]
            for number, answer in zip(batch, self.write(given, do_sample=False), strict=True):
                found[number] = answer
        return found

    def write(self, texts: list[str], **options: Any) -> list[str]:
        """Returns how each text goes on, up to its end; an empty string where that did not come."""
        given = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        end = self.tokenizer.eos_token_id
        rows = self.model.generate(
            **given.to(self.device), max_new_tokens=WRITTEN_TOKENS, pad_token_id=end, **options
        )[:, given.input_ids.shape[1] :].tolist()
        return [
            self.tokenizer.decode(row[: row.index(end)]).strip() if end in row else ""
            for row in rows
        ]


def prompts(base: str, count: int, seed: int) -> list[Row]:
    """Returns what an instruct model writes where a user's message begins, each once.

    The method is that of Magpie (Xu et al., arXiv 2406.08464): the chat template is given up to the
    opening of the user's turn, and the model goes on.
    """
    writer = Writer(base, seed)
    conversation = [{"role": "user", "content": "\0"}]
    opening = writer.tokenizer.apply_chat_template(conversation, tokenize=False).split("\0")[0]
    found: dict[str, None] = {}
    while len(found) < count:
        texts = [opening] * min(BATCH, count)
        for text in writer.write(texts, do_sample=True, temperature=1.0, top_p=0.95):
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
