"""What a library refuses: (name, call, what the message says)."""

from __future__ import annotations

from pathlib import Path

import torch

from landmark import Library, remember
from landmark.eval.subjects import Subject
from tiny import tiny_landmark, tiny_llama, tiny_tokenizer


def subject() -> Subject:
    return Subject("tiny", tiny_landmark(), tiny_tokenizer(), "landmark")


def remembered(folder: Path, text: str = "The grass is green. What is the pass key?") -> None:
    (folder / "a.txt").write_text(text, encoding="utf-8")
    remember([folder / "a.txt"], folder / "memory", subject())


def other_text(folder: Path) -> None:
    remembered(folder)
    remembered(folder, "The pass key is 12345.")


def without_texts(folder: Path) -> None:
    model = subject().model
    model.read(torch.arange(40)[None]).save(folder / "memory")
    Library.open(folder / "memory")


def plain(folder: Path) -> None:
    (folder / "a.txt").write_text("text", encoding="utf-8")
    remember(
        [folder / "a.txt"],
        folder / "memory",
        Subject("plain", tiny_llama(), tiny_tokenizer(), "full"),
    )


CASES = [
    (
        "other texts than were remembered",
        other_text,
        "FILES: expected those of the library in .* first .*a.txt.*name them",
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
        lambda folder: remember([folder / "no.txt"], folder / "m", subject()),
        "no such file",
    ),
    ("a plain model", plain, "expected a landmark model"),
]
