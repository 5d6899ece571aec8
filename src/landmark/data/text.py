"""Texts to train and evaluate on: folders of .txt files, single files, JSONL, and data sets of the hub."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        title: what names it: the title in the folder's MANIFEST.tsv, else its file name or row.
        text: its characters.
        sha256: hash of the file's bytes (of the UTF-8 text for rows of JSONL files and hub data sets).
    """

    title: str
    text: str
    sha256: str


def read_documents(source: str | Path, *, split: str = "train", field: str = "text") -> Iterator[Document]:
    """Reads the documents of a source, in an order that does not depend on the machine.

    Args:
        source: a folder (all ``.txt`` files below it, by relative path; of its subfolder ``split`` where it has
            ``train``, ``validation`` or ``test`` subfolders), a ``.txt`` file, a ``.jsonl`` file, or ``name`` or
            ``name:config`` of a data set of the hub.
        split: which part to read; single files have no parts and are read whole.
        field: the key of the text in JSONL rows and data sets.

    Raises:
        FileNotFoundError: there is no such file, folder, split or data set.
        ModuleNotFoundError: a hub name without the package ``datasets``.
        ValueError: a file that is empty or not text, a row without the field, or no text at all.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(split_folder(path, split))
    if path.is_file():
        return _read_jsonl(path, field) if path.suffix in (".jsonl", ".json") else iter([_read_file(path, path.name)])
    name = str(source)
    if path.is_absolute() or name.startswith(".") or path.suffix in (".txt", ".jsonl") or len(path.parts) > 2:
        raise FileNotFoundError(f"{name}: no such file or folder; pass a folder of .txt files, a .txt or a .jsonl file")
    return _read_hub(name, split, field)


def split_folder(folder: Path, split: str) -> Path:
    """Returns the subfolder of a split, or the folder itself where it is not divided into splits."""
    present = [name for name in SPLITS if (folder / name).is_dir()]
    if not present:
        return folder
    if split not in present:
        raise FileNotFoundError(
            f"{folder}: expected a subfolder {split!r}, found {present}; add it or name another split"
        )
    return folder / split


def has_split(source: str | Path, split: str) -> bool:
    """Whether the source is a folder with a subfolder of that split."""
    return (Path(source) / split).is_dir()


def _read_folder(folder: Path) -> Iterator[Document]:
    files = sorted(folder.rglob("*.txt"), key=lambda file: file.relative_to(folder).as_posix())
    if not files:
        raise ValueError(f"{folder}: expected .txt files, found none; pass a folder that holds them or a .jsonl file")
    titles = _manifest_titles(folder)
    for file in files:
        name = file.relative_to(folder).as_posix()
        yield _read_file(file, titles.get(name, name))


def _manifest_titles(folder: Path) -> dict[str, str]:
    for base in (folder, folder.parent):
        manifest = base / "MANIFEST.tsv"
        if not manifest.is_file():
            continue
        with manifest.open(encoding="utf-8", newline="") as lines:
            rows = [row for row in csv.DictReader(lines, delimiter="\t") if row.get("file") and row.get("title")]
        start = "" if base == folder else f"{folder.name}/"
        return {row["file"].removeprefix(start): _full_title(row) for row in rows if row["file"].startswith(start)}
    return {}


def _full_title(row: dict[str, str]) -> str:
    return f"{row['title']} ({row['author']})" if row.get("author") else row["title"]


def _read_file(path: Path, title: str) -> Document:
    raw = path.read_bytes()
    return Document(title, _decode(raw, path), hashlib.sha256(raw).hexdigest())


def _decode(raw: bytes, path: Path) -> str:
    if not raw.strip():
        raise ValueError(f"{path}: expected text, got an empty file; remove it or put text into it")
    if b"\0" in raw:
        raise ValueError(f"{path}: expected UTF-8 text, got binary data (a zero byte); remove the file or convert it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, got byte 0x{raw[error.start]:02x} at {error.start}; convert it to UTF-8"
        ) from None


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            empty, where = False, f"{path.name}, line {number}"
            try:
                row = json.loads(_decode(line, path))
            except json.JSONDecodeError:
                raise ValueError(
                    f"{path}, line {number}: expected one JSON object per line, got {line[:40]!r}"
                ) from None
            yield from _from_row(row, field, where)
    if empty:
        raise ValueError(f"{path}: expected text, got an empty file; remove it or put text into it")


def _read_hub(name: str, split: str, field: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        raise ModuleNotFoundError(
            f"{name}: no such file or folder here, and reading it from the hub needs the package datasets: "
            "pip install landmark-attention[train]"
        ) from None
    repository, _, config = name.partition(":")
    try:
        rows = load_dataset(repository, config or None, split=split)
    except Exception as error:  # the package raises many kinds: no such data set, split or connection
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{name}: neither a file or folder here nor a data set of the hub ({reason})") from None
    for number, row in enumerate(rows):
        yield from _from_row(row, field, f"{name}, {split} row {number}")


def _from_row(row: Any, field: str, title: str) -> Iterator[Document]:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{title}: expected a string under {field!r}, got {keys}; name the key of the text")
    if text.strip():
        yield Document(title, text, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
