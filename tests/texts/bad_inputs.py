"""What remembering, asking and explaining refuse: (name, call, what the message says)."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

import landmark
from landmark import Library, remember
from landmark.data.sources import Source, read_sources
from landmark.texts.explain import explain_memory
from landmark.texts.loading import LoadedModel
from landmark.texts.rank import read_document
from tiny import tiny_landmark, tiny_llama, tiny_tokenizer


def loaded() -> LoadedModel:
    return LoadedModel("tiny", tiny_landmark(), tiny_tokenizer())


def remembered(folder: Path, text: str = "The grass is green. What is the pass key?") -> None:
    (folder / "a.txt").write_text(text, encoding="utf-8")
    remember([folder / "a.txt"], folder / "memory", loaded())


def other_text(folder: Path) -> None:
    remembered(folder)
    remembered(folder, "The pass key is 12345.")


def without_texts(folder: Path) -> None:
    model = loaded().model
    model.read(torch.arange(40)[None]).save(folder / "memory")
    Library.open(folder / "memory")


def plain(folder: Path) -> None:
    (folder / "a.txt").write_text("text", encoding="utf-8")
    remember(
        [folder / "a.txt"],
        folder / "memory",
        LoadedModel("plain", tiny_llama(), tiny_tokenizer()),
    )


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


def tildeless() -> PreTrainedTokenizerFast:
    """Returns a tokenizer that has no token for a tilde."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    return tokenizer


CASES = [
    (
        "other texts than were remembered",
        other_text,
        "^files: expected those of the library in .* first .*a.txt.*name them",
    ),
    (
        "a memory without texts",
        without_texts,
        "expected a memory with its texts .* use landmark remember",
    ),
    (
        "no memory there",
        lambda folder: Library.open(folder),
        "expected a memory with a file memory.json",
    ),
    (
        "a file that is not there",
        lambda folder: remember([folder / "no.txt"], folder / "m", loaded()),
        "no such file",
    ),
    ("a plain model", plain, "expected a landmark model"),
    (
        "a text of no token",
        lambda: landmark.explain(tiny_landmark(), tildeless(), [("notes.txt", "~~")], "What"),
        r"text: expected at least one token, got none in notes\.txt: the tokenizer drops .*; "
        r"pass another",
    ),
    (
        "a document of no token",
        lambda: read_document(loaded(), torch.zeros(0, dtype=torch.long)),
        "document: expected at least one token, got none; leave it out",
    ),
    (
        "explain by a plain model",
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
