"""Files that commands write: asked for before anything is computed, and written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_writable(path: str | Path, name: str) -> None:
    """Tries to write beside a file; leaves everything as it is.

    Args:
        path: of the file.
        name: of the parameter, for the message.

    Raises:
        ValueError: no file can be written there.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        with _made(path.parent):
            if _is_replaced(path):
                _new(path).touch()
                _new(path).unlink()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: expected a file that can be written, got {path} ({_reason(error)}); name another"
        ) from None


def require_folder(path: str | Path, name: str) -> None:
    """The same for a folder in which files are to be written, there or not yet."""
    try:
        with _made(Path(path)):
            require_writable(Path(path) / ".landmark", name)
    except OSError as error:
        raise ValueError(f"{name}: expected a folder, got {path} ({_reason(error)}); name another") from None


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Inside a ``with``, the folder is there; afterwards those are gone that were not there before."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in missing:
            if each.is_dir():
                each.rmdir()


def write(path: str | Path, data: bytes) -> None:
    """Writes a file whole, or leaves the old one; makes its folder.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _is_replaced(path):
            path.write_bytes(data)
            return
        try:
            _new(path).write_bytes(data)
            os.replace(_new(path), os.path.realpath(path))
        except BaseException:
            _new(path).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)


def _is_replaced(path: Path) -> bool:
    """Whether it is an ordinary file, or none yet; a pipe or device is written into."""
    return path.is_file() or not path.exists()


def _new(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, "a link to itself")
    return target.with_name(f"{target.name}.new")
