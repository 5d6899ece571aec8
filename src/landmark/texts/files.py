"""Text files and folders that a user names, read whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from landmark.data.characters import from_arguments
from landmark.data.encoding import Progress
from landmark.data.sources import Source
from landmark.data.text import Document, read_documents, text_files
from landmark.texts.reading import counted


def file_sources(files: Iterable[Path], progress: Progress | None = None) -> list[Source]:
    """Returns text files as sources that are named by their paths.

    These are the files that are named, the ``.txt`` files below folders, and each row of JSONL
    files.

    Args:
        files: files and folders.
        progress: called before each file is read: a pipe may be slow.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: empty, no UTF-8 text, or a folder without ``.txt`` files.
    """
    found: list[Path] = []
    for file in files:
        if not file.exists():
            raise FileNotFoundError(
                f"files: expected text files or folders of .txt files, got {file}: no such file"
            )
        inside = sorted(text_files(file)) if file.is_dir() else []
        found += inside or [file]
    return [
        Source(from_arguments(str(file.parent / document.title)), document.text)
        for file in counted("texts read", found, progress)
        for document in read_documents(file)
    ]


def file_documents(file: Path) -> list[Document]:
    """Returns the document of a text file, or those of a JSONL file, titled by their paths.

    Raises:
        FileNotFoundError: no file, or a folder.
        ValueError: empty, or no UTF-8 text.
    """
    if file.is_dir() or not file.exists():
        what = "a folder" if file.is_dir() else "which does not exist"
        raise FileNotFoundError(
            f"files: expected text files, got {file}, {what}; name the files, {file}/*.txt"
        )
    return [
        replace(document, title=from_arguments(str(file.parent / document.title)))
        for document in read_documents(file)
    ]


def file_text(path: Path, name: str, others: str = "") -> str:
    """Returns the text of a file or of a folder of ``.txt`` files.

    Of a folder that is divided into splits, its ``test`` split is read.

    Args:
        path: file or folder.
        name: of the parameter, for the message.
        others: what else the parameter takes, for the message.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: empty, or no UTF-8 text.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{name}: expected {others}a text file or a folder of .txt files, got {path}, which "
            "does not exist"
        )
    return "\n\n".join(document.text for document in read_documents(path, split="test"))
