"""What reading, tokenising and laying out texts refuses: (name, call, what the message says)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from landmark.data.episodes import Episodes
from landmark.data.rows import Windows
from landmark.data.text import Document, read_documents
from landmark.data.tokenizer import backend, load_tokenizer, train_tokenizer
from landmark.data.tokens import open_tokens, tokenize


def reading(name: str, content: bytes, **options: str) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        (folder / name).write_bytes(content)
        return list(read_documents(folder if name.endswith(".txt") else folder / name, **options))

    return call


def manifest(line: bytes) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        (folder / "a.txt").write_text("text")
        (folder / "MANIFEST.tsv").write_bytes(b"file\ttitle\n" + line)
        return list(read_documents(folder))

    return call


def missing_package(name: str) -> Callable[[], object]:
    def call() -> object:
        with mock.patch.dict(sys.modules, {"datasets": None}):
            return list(read_documents(name))

    return call


def missing_split(folder: Path) -> object:
    (folder / "train").mkdir()
    return list(read_documents(folder, split="test"))


def words() -> Document:
    return Document("words", "some words", "0")


def damaged_tokens(folder: Path) -> object:
    file = tokenize(lambda: [words()], train_tokenizer(["words"], 300), folder, "train")
    file.path.write_bytes(b"\0")
    return open_tokens(folder / "train.json")


def foreign_tokens(folder: Path) -> object:
    (folder / "train.json").write_text('{"rows": 3}')
    (folder / "train.bin").write_bytes(b"\0\0")
    return tokenize(lambda: [words()], train_tokenizer(["words"], 300), folder, "train")


def half_a_token_file(folder: Path) -> object:
    (folder / "train.json").write_text("{}")
    return open_tokens(folder / "train.json")


def no_documents(folder: Path) -> object:
    return tokenize(lambda: [], train_tokenizer(["words"], 300), folder, "train")


def episodes(tokens: int, length: int) -> object:
    ids = np.zeros(length, dtype=np.uint16)
    core = backend(train_tokenizer(["words"], 300))
    return Episodes(core, ids, tokens=tokens, seed=0, block_tokens=63)


CASES = [
    (
        "an empty text file",
        reading("a.txt", b" \n"),
        r"a\.txt: expected text, got an empty file; remove",
    ),
    (
        "a binary file",
        reading("a.txt", b"PK\x03\x04\0\0"),
        r"a\.txt: expected UTF-8 text, got binary.*remove",
    ),
    (
        "a text in Latin-1",
        reading("a.txt", b"caf\xe9 au lait"),
        r"a\.txt: .*byte 0xe9 at 3; convert it to UTF-8",
    ),
    (
        "an empty folder",
        lambda folder: list(read_documents(folder)),
        r"expected \.txt files, found none; pass",
    ),
    (
        "nothing there",
        lambda folder: list(read_documents(folder / "none")),
        "none: no such file or folder; pass",
    ),
    (
        "a text file not there",
        lambda: list(read_documents("none.txt")),
        r"none\.txt: no such file or folder; pass",
    ),
    ("a split not there", missing_split, r"expected a subfolder 'test', found \['train'\]; add it"),
    (
        "a row that is no JSON",
        reading("a.jsonl", b"{}x\n"),
        r"line 1: expected one JSON object per line, got",
    ),
    (
        "a row without the field",
        reading("a.jsonl", b'{"body": "x"}'),
        r"line 1: .*'text', got \['body'\]; name the key",
    ),
    (
        "a row that is a list",
        reading("a.jsonl", b"[1]"),
        "line 1: expected a string under 'text', got list; write",
    ),
    (
        "a deep row",
        reading("a.jsonl", b'{"text": "a"}\n{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        r"a\.jsonl, line 2: expected JSON that Python can read, got arrays or objects in too "
        r"many others; leave",
    ),
    (
        "a row with a long number",
        reading("a.jsonl", b'{"x": ' + b"9" * 5000 + b"}"),
        r"a\.jsonl, line 1: .*got an integer of too many digits; leave",
    ),
    (
        "a row of many keys",
        reading("a.jsonl", json.dumps({f"key{n}": n for n in range(50_000)}).encode()),
        r"a\.jsonl, line 1: .*'key10'.* and 49995 more keys; name",
    ),
    (
        "a row whose text is a list",
        reading("a.jsonl", b'{"text": []}'),
        "line 1: .* got list there; name",
    ),
    (
        "rows without text",
        reading("a.jsonl", b'{"text": " "}'),
        r"a\.jsonl: expected text, got an empty file",
    ),
    (
        "a text in UTF-16",
        reading("a.txt", "text".encode("utf-16")),
        r"a\.txt: .*got UTF-16.*convert",
    ),
    (
        "a row in Latin-1",
        reading("a.jsonl", b'{}\n{"text": "caf\xe9"}'.replace(b"{}\n", b"\n")),
        r"a\.jsonl, line 2: .*0xe9",
    ),
    ("a manifest in Latin-1", manifest(b"caf\xe9"), r"MANIFEST\.tsv: expected UTF-8 columns"),
    ("a manifest that is none", manifest(b"x" * 200_000), r"MANIFEST\.tsv: expected UTF-8 columns"),
    (
        "a device",
        lambda: read_documents("/dev/null"),
        "/dev/null: expected a file, a folder or a pipe",
    ),
    (
        "an empty JSONL file",
        reading("a.jsonl", b"\n\n"),
        r"a\.jsonl: expected text, got an empty file",
    ),
    (
        "hub data without datasets",
        missing_package("pg19"),
        r"pg19.*pip install landmark-attention\[train\]",
    ),
    (
        "a vocabulary too small",
        lambda: train_tokenizer(["text"], 100),
        "vocab_size: expected at least 258.*got 100",
    ),
    (
        "no tokenizer there",
        lambda folder: load_tokenizer(folder),
        "no tokenizer there.*pass a folder",
    ),
    ("damaged token file", damaged_tokens, r"train\.bin: expected \d+ bytes, got 1; .*delete it"),
    (
        "foreign token file",
        foreign_tokens,
        r"train\.json: expected the header of a landmark-tokens-1 file",
    ),
    ("half a token file", half_a_token_file, r"train\.bin: missing; .*delete the other"),
    ("no documents", no_documents, "train: expected at least one document, got none; pass"),
    (
        "text shorter than a row",
        lambda: episodes(504, 300),
        "more than 504 tokens.*got 300; add text",
    ),
    (
        "rows too short for episodes",
        lambda: episodes(60, 300),
        "at least 128 tokens for episodes, got 60; lengthen",
    ),
    (
        "windows of too short a text",
        lambda: Windows(np.zeros(9, dtype=np.uint16), tokens=10, seed=0),
        "at least 10 tokens.*got 9; add text",
    ),
]
