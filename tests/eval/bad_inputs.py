"""What an explanation refuses: (name, call, what the message says)."""

from __future__ import annotations

import torch

import landmark
from landmark.data.sources import Source, read_sources
from landmark.eval.explain import explain_memory
from tiny import tiny_landmark, tiny_llama, tiny_tokenizer


def explain(text: object, question: str, **more: int) -> object:
    return landmark.explain(tiny_landmark(), tiny_tokenizer(), text, question, **more)


def another_memory() -> None:
    model, tokenizer = tiny_landmark(), tiny_tokenizer()
    reading = read_sources([Source("a", "The grass is green. ")], tokenizer)
    memory = model.read(torch.cat((reading.ids, reading.ids[:1]))[None])
    explain_memory(model, tokenizer, memory, reading, "What")


def padded_memory() -> None:
    model, tokenizer = tiny_landmark(), tiny_tokenizer()
    reading = read_sources([Source("a", "The grass is green. ")], tokenizer)
    ids = torch.cat((reading.ids[:1], reading.ids))[None]
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    explain_memory(model, tokenizer, model.read(ids, mask), reading, "What")


CASES = [
    (
        "a plain model",
        lambda: landmark.explain(tiny_llama(), tiny_tokenizer(), "a", "b"),
        "model: expected a landmark model, got LlamaForCausalLM; use landmark.convert",
    ),
    ("no text", lambda: explain("", "What"), "text: expected at least one character.*pass a text"),
    ("no sources", lambda: explain([], "What"), "text: expected at least one character, got 0 empty texts"),
    ("no question", lambda: explain("The grass", ""), "question: expected at least one token.*ask"),
    ("no new tokens", lambda: explain("The grass", "What", max_new_tokens=0), "max_new_tokens: expected.*got 0; pass"),
    ("a slow tokenizer", lambda: read_sources([Source("a", "b")], object()), "tokenizer: expected a fast one.*object"),
    ("a memory of other text", another_memory, "memory: expected one row of the .* text tokens of the reading"),
    ("a memory with padding", padded_memory, r"without padding, got rows of \[(\d+)\] in .* columns"),
]
