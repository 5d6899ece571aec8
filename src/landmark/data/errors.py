"""What an error says, in one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 200  # characters of what other packages say


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says that is not empty; the error's kind where it
    says nothing.
    """
    return _cut(
        next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
    )


def one_line(error: BaseException) -> str:
    """Returns an error's kind and all that it says."""
    return _cut(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _cut(said: str) -> str:
    return said if len(said) <= LONGEST else f"{said[:LONGEST]}..."


@contextmanager
def names(path: str | Path) -> Iterator[None]:
    """Inside a ``with``, an error of the system that names no file names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
