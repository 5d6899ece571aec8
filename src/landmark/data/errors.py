"""Turns what an error says into one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 200  # characters kept of the message of another package


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message that is not empty; without one, its class."""
    for line in str(error).splitlines():
        if line.strip():
            return _cut(line.strip())
    return type(error).__name__


def one_line(error: BaseException) -> str:
    """Returns the class of an error and its whole message."""
    return _cut(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _cut(said: str) -> str:
    return said if len(said) <= LONGEST else f"{said[:LONGEST]}..."


@contextmanager
def names(path: str | Path) -> Iterator[None]:
    """Puts the name of a file into an ``OSError`` raised inside that names none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
