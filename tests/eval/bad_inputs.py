"""What an explanation refuses: (name, call, what the message says)."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import normalizers

import landmark
from landmark.data.sources import Source, read_sources
from landmark.eval import index
from landmark.eval.demo import load_text
from landmark.eval.explain import explain_memory
from landmark.eval.subjects import Subject
from tiny import tiny_landmark, tiny_llama, tiny_tokenizer


def explain(text: object, question: str, **more: int) -> object:
    return landmark.explain(tiny_landmark(), tiny_tokenizer(), text, question, **more)


def another_memory() -> None:
    model = tiny_landmark()
    tokenizer = tiny_tokenizer()
    reading = read_sources([Source("a", "The grass is green. ")], tokenizer)
    memory = model.read(torch.cat((reading.ids, reading.ids[:1]))[None])
    explain_memory(model, tokenizer, memory, reading, "What")


def padded_memory() -> None:
    model = tiny_landmark()
    tokenizer = tiny_tokenizer()
    reading = read_sources([Source("a", "The grass is green. ")], tokenizer)
    ids = torch.cat((reading.ids[:1], reading.ids))[None]
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    explain_memory(model, tokenizer, model.read(ids, mask), reading, "What")


def subject() -> Subject:
    """With a tokenizer that has no token for a tilde."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    return Subject("tiny", tiny_landmark(), tokenizer, "landmark")


def demo_of_no_token(folder: Path) -> None:
    (folder / "a.txt").write_text("~" * 99)
    load_text(folder / "a.txt", subject().tokenizer)


def index_of_no_token() -> None:
    index.run(
        subject(), index.IndexTask(kinds=("exact",)), ["~", "~~"], "notes.txt", lambda row: None
    )


CASES = [
    (
        "a text of no token",
        lambda: landmark.explain(
            tiny_landmark(), subject().tokenizer, [("notes.txt", "~~")], "What"
        ),
        r"text: expected at least one token, got none in notes\.txt: the tokenizer drops .*; "
        r"pass another",
    ),
    (
        "a demo of no token",
        demo_of_no_token,
        r"^--text: expected a text of at least one token, got none in .*a\.txt",
    ),
    (
        "an index of no token",
        index_of_no_token,
        r"--data: expected .* one token, got none in notes\.txt",
    ),
    (
        "a plain model",
        lambda: landmark.explain(tiny_llama(), tiny_tokenizer(), "a", "b"),
        "model: expected a landmark model, got LlamaForCausalLM; use landmark.convert",
    ),
    ("no text", lambda: explain("", "What"), "text: expected at least one character.*pass a text"),
    (
        "no sources",
        lambda: explain([], "What"),
        "text: expected at least one character, got 0 empty texts",
    ),
    ("no question", lambda: explain("The grass", ""), "question: expected at least one token.*ask"),
    (
        "no new tokens",
        lambda: explain("The grass", "What", max_new_tokens=0),
        "max_new_tokens: expected.*got 0; pass",
    ),
    (
        "a slow tokenizer",
        lambda: read_sources([Source("a", "b")], object()),
        "tokenizer: expected a fast one.*object",
    ),
    (
        "a memory of other text",
        another_memory,
        "memory: expected one row of the .* text tokens of the reading",
    ),
    (
        "a memory with padding",
        padded_memory,
        r"without padding, got rows of \[(\d+)\] in .* columns",
    ),
]
