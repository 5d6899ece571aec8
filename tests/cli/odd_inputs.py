"""Odd files, folders and words that people give to commands, and the commands that take them.

Each thing is made in an empty folder and returns the argument that names it; ``True`` says that it
is a text, so that the commands that read texts succeed; ``False`` that they refuse it; ``None``
that it depends on the command.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

TEXT = "The road went on. The pass key is 12345. Nobody was there.\n" * 6
ROW = json.dumps({"text": TEXT})
HALF = json.dumps({"text": TEXT + "cut within an emoji: \ud83d and so on."})
DEEP = "[" * 100_000 + "]" * 100_000


def file(name: str | bytes, content: str | bytes) -> Callable[[Path], str]:
    """A file of that name with that content, a text in UTF-8."""

    def make(folder: Path) -> str:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as opened:
            opened.write(content if isinstance(content, bytes) else content.encode())
        return os.fsdecode(path)

    return make


def named(argument: str) -> Callable[[Path], str]:
    """An argument as it stands, with FOLDER for the folder."""
    return lambda folder: argument.replace("FOLDER", str(folder))


def folder_of(**files: str | bytes) -> Callable[[Path], str]:
    """A folder with these files; ``_`` in their names is a point."""

    def make(folder: Path) -> str:
        (folder / "texts").mkdir()
        for name, content in files.items():
            file(name.replace("_", "."), content)(folder / "texts")
        return str(folder / "texts")

    return make


def folder_named_as_a_text(folder: Path) -> str:
    (folder / "texts" / "chapter.txt").mkdir(parents=True)
    (folder / "texts" / "chapter.txt" / "a.txt").write_text(TEXT)
    return str(folder / "texts")


def broken_link(folder: Path) -> str:
    (folder / "link.txt").symlink_to(folder / "gone.txt")
    return str(folder / "link.txt")


def folder_with_a_broken_link(folder: Path) -> str:
    (folder / "texts").mkdir()
    broken_link(folder / "texts")
    return str(folder / "texts")


def loop(folder: Path) -> str:
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    return str(folder / "loop.txt")


def inside_a_file(folder: Path) -> str:
    return file("a.txt", TEXT)(folder) + "/b.txt"


def a_socket(folder: Path) -> str:
    here = Path.cwd()
    os.chdir(folder)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket.txt")
    os.chdir(here)
    return str(folder / "socket.txt")


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.txt")
    threading.Thread(target=(folder / "pipe.txt").write_text, args=(TEXT,), daemon=True).start()
    return str(folder / "pipe.txt")


THINGS: dict[str, tuple[Callable[[Path], str], bool | None]] = {
    "old Mac line ends": (file("mac.txt", TEXT.replace("\n", "\r")), True),
    "Windows line ends": (file("windows.txt", TEXT.replace("\n", "\r\n")), True),
    "a byte order mark": (file("mark.txt", "\ufeff" + TEXT), True),
    "control sequences": (
        file("controls.txt", TEXT + "\x1b[31mred\x07\b\x9b2J\u202eback\u2028" + TEXT),
        True,
    ),
    "one long line": (file("line.txt", TEXT.replace("\n", " ")), True),
    "an empty file": (file("empty.txt", ""), False),
    "only whitespace": (file("blank.txt", " \r\n\t\r"), False),
    "only a byte order mark": (file("mark.txt", "\ufeff"), False),
    "zero bytes": (file("zero.txt", b"\0" * 99), False),
    "Latin-1": (file("latin.txt", b"caf\xe9 " * 99), False),
    "UTF-16": (file("wide.txt", TEXT.encode("utf-16")), False),
    "surrogates in UTF-8": (file("half.txt", TEXT.encode() + b"\xed\xa0\xbd"), False),
    "rows": (file("rows.jsonl", f"{ROW}\n\n{ROW}\n"), True),
    "rows with old Mac line ends": (file("mac.jsonl", f"{ROW}\r\r{ROW}\r"), True),
    "rows with Windows line ends": (file("windows.jsonl", f"{ROW}\r\n{ROW}\r\n"), True),
    "a row with half an emoji": (file("half.jsonl", HALF + "\n"), True),
    "a row with zero characters": (
        file("zero.jsonl", json.dumps({"text": TEXT + "\0\x1b[2J"})),
        True,
    ),
    "a row with NaN": (file("nan.jsonl", '{"x": NaN, "y": -Infinity, ' + ROW[1:]), True),
    "a row with a key twice": (file("twice.jsonl", '{"text": 1, ' + ROW[1:]), True),
    "rows with a byte order mark": (file("mark.jsonl", "\ufeff" + ROW), True),
    "a deep row": (file("deep.jsonl", '{"x": ' + DEEP + ", " + ROW[1:]), False),
    "a row with a long number": (file("long.jsonl", '{"x": ' + "9" * 5000 + ", " + ROW[1:]), False),
    "a row of many keys": (
        file("keys.jsonl", json.dumps({f"key{n}": n for n in range(20_000)})),
        False,
    ),
    "a row with a long key": (file("key.jsonl", json.dumps({"x" * 20_000: TEXT})), False),
    "a row with a key of controls": (
        file("key.jsonl", json.dumps({"\x1b[31m\n\ud83d": TEXT})),
        False,
    ),
    "a row that is a list": (file("list.jsonl", "[1]\n"), False),
    "a row that is a number": (file("number.jsonl", "7\n"), False),
    "a row that is null": (file("null.jsonl", "null\n"), False),
    "a row whose text is a list": (file("text.jsonl", '{"text": ["a"]}\n'), False),
    "a row cut off": (file("cut.jsonl", ROW[:-9]), False),
    "a row of control characters": (file("controls.jsonl", "\x1b[31m\x07\n"), False),
    "rows without text": (file("blank.jsonl", '{"text": " "}\n{"text": ""}\n'), False),
    "rows in UTF-16": (file("wide.jsonl", ROW.encode("utf-16")), False),
    "a JSON object over several lines": (
        file("object.json", json.dumps({"text": TEXT}, indent=2)),
        True,
    ),
    "a JSON object in one line": (file("object.json", ROW), True),
    "a JSON array of rows": (file("array.json", f"[{ROW}, {HALF}]"), True),
    "a JSON array over several lines": (
        file("array.json", json.dumps([{"text": TEXT}] * 2, indent=1)),
        True,
    ),
    "rows in a .json": (file("rows.json", f"{ROW}\n{ROW}\n"), True),
    "an empty JSON array": (file("array.json", "[]"), False),
    "a JSON array of numbers": (file("numbers.json", "[1, 2]"), False),
    "a deep JSON file": (file("deep.json", DEEP), False),
    "an empty .json": (file("empty.json", "\n"), False),
    "a name that is no UTF-8": (file(b"caf\xe9.txt", TEXT), True),
    "a name of control characters": (file("\x1b[31m\r\n\x07\u202e.txt", TEXT), True),
    "a name of brackets": (file("[/red] [bold] $x_{.txt", TEXT), True),
    "a name of 200 characters": (file("n" * 196 + ".txt", TEXT), True),
    "a name of 2000 characters": (named("FOLDER/" + "n" * 2000 + ".txt"), False),
    "a zero character": (named("FOLDER/a\0b.txt"), False),
    "a name with a dash": (named("-dash.txt"), False),
    "a dash": (named("-"), False),
    "nothing there": (named("FOLDER/gone.txt"), False),
    "a controlled name of nothing": (named("FOLDER/\x1b]0;gone\x07\r\n\udce9.txt"), False),
    "an empty folder": (folder_of(), False),
    "a folder of texts": (folder_of(a_txt=TEXT, b_txt=TEXT.replace("\n", "\r")), None),
    "a folder with an image": (folder_of(a_txt=TEXT, b_txt=b"\x89PNG\0"), False),
    # remember and explain name texts by their paths and read no manifest
    "a folder with a bad manifest": (
        folder_of(a_txt=TEXT, MANIFEST_tsv=b"file\ttitle\na.txt\tcaf\xe9\n"),
        None,
    ),
    "a folder with a long manifest": (
        folder_of(a_txt=TEXT, MANIFEST_tsv="file\ttitle\n" + "x" * 200_000),
        None,
    ),
    "a folder named as a text": (folder_named_as_a_text, None),
    "a folder with a broken link": (folder_with_a_broken_link, False),
    "a broken link": (broken_link, False),
    "a link to itself": (loop, False),
    "inside a file": (inside_a_file, False),
    "a socket": (a_socket, False),
    "a device": (named("/dev/null"), False),
    "a pipe": (pipe, None),
}

READERS = {
    "generate": "generate hi --model MARKED --max-new-tokens 2 --file THING",
    "remember": "remember THING --out out/memory --model MARKED",
    "explain": "explain THING --question hi --model MARKED --max-new-tokens 2 --out out/page.html",
    "rank": "rank hi THING --model MARKED",
    "passkey": (
        "eval passkey --model MARKED --lengths 150 --trials 1 --filler THING --out out/rows.json"
    ),
    "recall": (
        "eval recall --model MARKED --lengths 150 --trials 1 --filler THING --out out/rows.json"
    ),
    "perplexity": (
        "eval perplexity --model MARKED --data THING --lengths 20 --max-tokens 40 --out "
        "out/rows.json"
    ),
}
REFUSING = {  # every text here is too short for them
    "demo": "demo --model MARKED --text THING --out out/demo.png",
    "train": "train --data THING --out out/tuned --model MARKED --steps 1 --length 100000",
    "eval rank": "eval rank --model MARKED --data THING --passages 999",
    "eval index": (
        "eval index --model MARKED --data THING --index exact --landmarks 9000 --max-tokens 50"
    ),
}
OPENERS = {  # nothing here is a memory or a model
    "ask": "ask THING hi",
    "memory info": "memory info THING",
    "memory verify": "memory verify THING",
    "memory compact": "memory compact THING",
    "convert": "convert THING --out out/converted",
    "model": "generate hi --model THING",
    "recipe": "train --data TEXT --out out/tuned --config THING --steps 1 --batch 1",
    "tokenizer": "train --data TEXT --out out/tuned --tokenizer THING",
}
