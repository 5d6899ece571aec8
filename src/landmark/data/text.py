"""Reads texts: folders of .txt files, single files, JSON rows, and data sets of the hub.

Files are decoded here: UTF-8, with or without a byte order mark, lines that end in LF, CR LF or CR.
Half a character in a JSON string (a lone surrogate) becomes U+FFFD.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from landmark.data.characters import from_arguments, without_surrogates
from landmark.data.errors import first_line, names

SPLITS = ("train", "validation", "test")
# How much a message quotes.
SHOWN_KEYS = 5
SHOWN_CHARACTERS = 40


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        title: the title in the folder's MANIFEST.tsv, else the file name or row.
        text: its characters.
        sha256: hash of the file's bytes (of the UTF-8 text for rows of JSONL files and hub data
            sets).
    """

    title: str
    text: str
    sha256: str


class Record(NamedTuple):
    """A row of a JSON file or data set, and the words that name it in messages."""

    where: str
    value: Any


def read_documents(
    source: str | Path, *, split: str = "train", field: str = "text"
) -> Iterator[Document]:
    """Reads the documents of a source, in an order that does not depend on the machine.

    Args:
        source: a folder (all ``.txt`` files below it, by relative path; of its subfolder ``split``
            where it has ``train``, ``validation`` or ``test`` subfolders), a text file, a
            ``.jsonl`` file with an object in each line, a ``.json`` file (the same, or one object,
            or an array of them), a pipe with text, or ``name`` or ``name:config`` of a data set of
            the hub.
        split: which part to read; single files have no parts and are read whole.
        field: the key of the text in JSONL rows and data sets.

    Raises:
        FileNotFoundError: there is no such file, folder, split or data set.
        ModuleNotFoundError: a hub name without the package ``datasets``.
        ValueError: a file that is empty or not text, a row without the field, no text at all, or a
            device.
    """
    path = Path(source)
    name = str(source)
    if path.is_dir():
        return _read_folder(split_folder(path, split))
    if path.is_file() or path.is_fifo():
        if path.suffix in (".jsonl", ".json"):
            return _read_rows(path, field)
        return iter([_read_file(path, path.name)])
    if path.exists():
        raise ValueError(
            f"{name}: expected a file, a folder or a pipe, got a device or socket; write the text "
            "to a file"
        )
    if _is_no_hub_name(name):
        raise FileNotFoundError(
            f"{name}: no such file or folder; pass a folder of .txt files, a .txt or a .jsonl file"
        )
    return _read_hub(name, split, field)


def read_rows(source: str | Path, *, split: str = "train") -> Iterator[Record]:
    """Reads the rows of a JSON file or of a data set of the hub, whatever they hold.

    Args:
        source: a ``.jsonl`` or ``.json`` file, or ``name`` or ``name:config`` of a data set.
        split: which part of a data set to read.

    Raises:
        FileNotFoundError: there is no such file or data set.
        ModuleNotFoundError: a hub name without the package ``datasets``.
        ValueError: a file that is no JSON.
    """
    path = Path(source)
    if not path.is_file():
        yield from _hub_rows(str(source), split)
        return
    with names(path), path.open("rb") as opened:
        if path.suffix == ".json":
            rows = _whole_rows(path, opened.read())
        else:
            rows = _line_rows(path, opened)
        for where, row in rows:
            yield Record(f"{path.name}, {where}", row)


def kind_of(source: str | Path, *, split: str = "train") -> str:
    """Returns what a source holds, by its first row.

    Args:
        source: as ``read_documents`` takes it.
        split: as for ``read_documents``.

    Returns:
        ``messages`` (conversations, also rows with ``prompt`` and without ``text``), ``questions``
        (documents with questions about them, SQuAD, HotpotQA), or ``text``.

    Raises:
        FileNotFoundError: as ``read_rows``.
        ModuleNotFoundError: likewise.
        ValueError: likewise.
    """
    path = Path(source)
    is_text = path.is_dir() or (path.exists() and path.suffix not in (".json", ".jsonl"))
    if is_text or (not path.exists() and _is_no_hub_name(str(source))):
        return "text"
    first = next(iter(read_rows(source, split=split)), None)
    if first is None or not isinstance(first.value, dict):
        return "text"
    is_prompt = "prompt" in first.value and "text" not in first.value
    if "messages" in first.value or is_prompt:
        return "messages"
    if "documents" in first.value or isinstance(first.value.get("data"), list):
        return "questions"
    if "context" in first.value and "question" in first.value:
        return "questions"
    return "text"


def _is_no_hub_name(name: str) -> bool:
    path = Path(name)
    return (
        path.is_absolute()
        or name.startswith(".")
        or path.suffix in (".txt", ".jsonl")
        or len(path.parts) > 2
    )


def split_folder(folder: Path, split: str) -> Path:
    """Returns the subfolder of a split, or the folder itself where it has no splits.

    Raises:
        FileNotFoundError: the folder has other splits, but not this one.
    """
    present = [name for name in SPLITS if (folder / name).is_dir()]
    if not present:
        return folder
    if split not in present:
        raise FileNotFoundError(
            f"{folder}: expected a subfolder {split!r}, found {present}; add it or name another "
            "split"
        )
    return folder / split


def has_split(source: str | Path, split: str) -> bool:
    """Returns whether the source is a folder with a subfolder of that split."""
    return (Path(source) / split).is_dir()


def _read_folder(folder: Path) -> Iterator[Document]:
    files = text_files(folder)
    if not files:
        raise ValueError(
            f"{folder}: expected .txt files, found none; pass a folder that holds them or a "
            ".jsonl file"
        )
    titles = _manifest_titles(folder)
    for file in files:
        name = file.relative_to(folder).as_posix()
        yield _read_file(file, titles.get(name, name))


def text_files(folder: Path) -> list[Path]:
    """Returns the ``.txt`` files below a folder, sorted by relative path.

    Pipes and devices are left out, as they may never end.
    """
    found = (file for file in folder.rglob("*.txt") if file.is_file() or not file.exists())
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _manifest_titles(folder: Path) -> dict[str, str]:
    """Returns the titles in MANIFEST.tsv of a folder, or of the folder around it, by file."""
    for base in (folder, folder.parent):
        manifest = base / "MANIFEST.tsv"
        if not manifest.is_file():
            continue
        try:
            with names(manifest), manifest.open(encoding="utf-8-sig", newline="") as lines:
                rows = [
                    row
                    for row in csv.DictReader(lines, delimiter="\t")
                    if row.get("file") and row.get("title")
                ]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{manifest}: expected UTF-8 columns file, title, author, with tabs, got {error}; "
                "remove it"
            ) from None
        start = "" if base == folder else f"{folder.name}/"
        return {
            row["file"].removeprefix(start): _full_title(row)
            for row in rows
            if row["file"].startswith(start)
        }
    return {}


def _full_title(row: dict[str, str]) -> str:
    return f"{row['title']} ({row['author']})" if row.get("author") else row["title"]


def _read_file(path: Path, title: str) -> Document:
    with names(path):
        raw = path.read_bytes()
    text = _decode(raw, str(path))
    if not text.strip():
        raise _empty(path)
    return Document(from_arguments(title), text, hashlib.sha256(raw).hexdigest())


def _empty(path: Path) -> ValueError:
    return ValueError(f"{path}: expected text, got an empty file; remove it or put text into it")


def _decode(raw: bytes, where: str) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(
            f"{where}: expected UTF-8 text, got UTF-16 (by its byte order mark); convert it to "
            "UTF-8"
        )
    if b"\0" in raw:
        raise ValueError(
            f"{where}: expected UTF-8 text, got binary data (a zero byte); remove the file or "
            "convert it"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8 text, got byte 0x{raw[error.start]:02x} at {error.start}; "
            "convert it to UTF-8"
        ) from None


def _read_rows(path: Path, field: str) -> Iterator[Document]:
    found = False
    for row in read_rows(path):
        for document in _from_row(row.value, field, row.where):
            found = True
            yield document
    if not found:
        raise _empty(path)


def _whole_rows(path: Path, raw: bytes) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a file that is one JSON value: an object or an array of objects.

    A file that is not one value is read line by line.
    """
    try:
        value = _parse(_decode(raw, str(path)), str(path)) if raw.strip() else []
    except json.JSONDecodeError:
        yield from _line_rows(path, raw.splitlines())
        return
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _line_rows(path: Path, parts: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a file with one JSON object in each line."""
    # A CR alone ends a line as well.
    lines = itertools.chain.from_iterable(part.splitlines() for part in parts)
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                yield f"line {number}", _parse(_decode(line, where), where)
        except json.JSONDecodeError:
            raise ValueError(
                f"{where}: expected one JSON object per line, got {line[:SHOWN_CHARACTERS]!r}; "
                "write each object in a line of its own, or all of them as a .json file"
            ) from None


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or not in UTF-8; the message names the file.
    """
    try:
        with names(path):
            raw = path.read_bytes()
        return _parse(_decode(raw, str(path)), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: expected JSON, got something else ({error}); mend it or name another"
        ) from None


def _parse(text: str, where: str) -> Any:
    """Returns a JSON value.

    Raises:
        json.JSONDecodeError: the text is no JSON.
        ValueError: Python's parser refuses it.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        reason = "arrays or objects in too many others"
    except ValueError:  # Python's limit on the digits of an integer
        reason = "an integer of too many digits"
    raise ValueError(
        f"{where}: expected JSON that Python can read, got {reason}; leave that part out"
    )


def _read_hub(name: str, split: str, field: str) -> Iterator[Document]:
    for row in _hub_rows(name, split):
        yield from _from_row(row.value, field, row.where)


def _hub_rows(name: str, split: str) -> Iterator[Record]:
    try:
        from datasets import load_dataset  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        raise ModuleNotFoundError(
            f"{name}: no such file or folder here, and reading it from the hub needs the package "
            "datasets: pip install landmark-attention[train]"
        ) from None
    repository, _, config = name.partition(":")
    try:
        rows = load_dataset(repository, config or None, split=split)
    except Exception as error:
        # The package raises many kinds: no such data set, split or connection.
        raise FileNotFoundError(
            f"{name}: neither a file or folder here nor a data set of the hub ({first_line(error)})"
        ) from None
    for number, row in enumerate(rows):
        yield Record(f"{name}, {split} row {number}", row)


def _from_row(row: Any, field: str, title: str) -> Iterator[Document]:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{title}: expected a string under {field!r}, got {_kind(row, field)}")
    text = without_surrogates(text)
    if text.strip():
        yield Document(from_arguments(title), text, hashlib.sha256(text.encode()).hexdigest())


def _kind(row: Any, field: str) -> str:
    """Returns what a row is in place of an object with a string under ``field``, and a remedy."""
    if not isinstance(row, dict):
        return f"{type(row).__name__}; write an object"
    if field in row:
        return f"{type(row[field]).__name__} there; name the key of the text"
    keys = [
        key if len(key) <= SHOWN_CHARACTERS else f"{key[:SHOWN_CHARACTERS]}..."
        for key in sorted(row)[:SHOWN_KEYS]
    ]
    more = f" and {len(row) - SHOWN_KEYS} more keys" if len(row) > SHOWN_KEYS else ""
    return f"{keys}{more}; name the key of the text"
