"""What measuring refuses: (name, call, what the message says)."""

from __future__ import annotations

from pathlib import Path

from tokenizers import normalizers

from landmark.eval import index
from landmark.eval.demo import load_text
from landmark.texts.loading import LoadedModel
from tiny import tiny_landmark, tiny_tokenizer


def loaded() -> LoadedModel:
    """With a tokenizer that has no token for a tilde."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    return LoadedModel("tiny", tiny_landmark(), tokenizer)


def demo_of_no_token(folder: Path) -> None:
    (folder / "a.txt").write_text("~" * 99)
    load_text(folder / "a.txt", loaded().tokenizer)


def index_of_no_token() -> None:
    index.run(
        loaded(), index.IndexTask(kinds=("exact",)), ["~", "~~"], "notes.txt", lambda row: None
    )


CASES = [
    (
        "a demo of no token",
        demo_of_no_token,
        r"^text: expected a text of at least one token, got none in .*a\.txt",
    ),
    (
        "an index of no token",
        index_of_no_token,
        r"^texts: expected .* one token, got none in notes\.txt",
    ),
]
