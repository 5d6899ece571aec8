"""Files and folders that commands write: asked for before anything is computed, written whole or
not at all.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from landmark.data.errors import first_line

NEW = ".landmark-new"  # where a folder's files are written first
PIECE = (
    1 << 20
)  # of a file in which room is asked for, where the system cannot be asked for all at once


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
            f"{name}: expected a file that can be written, got {path} ({_reason(error)}); name "
            "another"
        ) from None


def require_folder(path: str | Path, name: str) -> None:
    """The same for a folder in which files are to be written, there or not yet."""
    try:
        with _made(Path(path)):
            require_writable(Path(path) / ".landmark", name)
    except OSError as error:
        raise ValueError(
            f"{name}: expected a folder, got {path} ({_reason(error)}); name another"
        ) from None


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Inside a ``with``, the folder is there; afterwards those are gone that were not there
    before.
    """
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


def require_room(folder: str | Path, nbytes: int, name: str) -> None:
    """Asks the system for room in a folder, and gives it back.

    Args:
        folder: there or not yet.
        nbytes: of the largest file that is to be written there.
        name: of the parameter, for the message.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    try:
        with _made(folder):
            try:
                _take_room(folder / NEW, nbytes)
            finally:
                (folder / NEW).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{name}: expected room for a file of {nbytes:,} bytes in {folder}, got none "
            f"({_reason(error)}); make room there or name another folder"
        ) from None


def _take_room(path: Path, nbytes: int) -> None:
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(1, nbytes))
            return
        for begin in range(0, nbytes, PIECE):
            file.write(bytes(min(PIECE, nbytes - begin)))


def write_folder(folder: str | Path, save: Callable[[Path], object]) -> None:
    """Adds files to a folder, all of them or none: those that are there stay until the new ones are
    whole.

    Args:
        folder: there or not yet.
        save: writes into the folder that it is given. Weights of a model that was there are
            replaced, all of them.

    Raises:
        ValueError: they cannot be written.
    """
    folder = Path(folder)
    new = (
        folder / NEW / os.path.basename(os.path.abspath(folder))
    )  # a model's files name their folder
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        shutil.rmtree(folder / NEW, ignore_errors=True)  # left by a process that was killed
        new.mkdir(parents=True)
        save(new)
        if any(map(_is_weights, new.iterdir())):
            for old in filter(_is_weights, folder.iterdir()):
                old.unlink()
        for file in sorted(new.rglob("*")):
            if not file.is_dir():
                place = folder / file.relative_to(new)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
        shutil.rmtree(folder / NEW)
    except BaseException as error:
        shutil.rmtree(folder / NEW, ignore_errors=True)
        for each in missing:
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()
        if not is_of_the_disk(error):
            raise
        raise ValueError(
            f"{folder}: expected room for all its files, got none ({first_line(error)}); make "
            "room there or name another folder; nothing was written"
        ) from None


def _is_weights(file: Path) -> bool:
    return file.name.startswith("model") and file.name.endswith(
        (".safetensors", ".safetensors.index.json")
    )


def is_of_the_disk(error: BaseException) -> bool:
    """Whether a file could not be written; safetensors and torch have kinds of their own for
    that.
    """
    kind = type(error)
    return (
        isinstance(error, OSError)
        or kind.__name__ == "SafetensorError"
        or "PytorchStreamWriter" in str(error)
    )


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileExistsError):  # of a folder that is to be made
        return "it is none"
    return str(getattr(error, "strerror", None) or error)


def _is_replaced(path: Path) -> bool:
    """Whether it is an ordinary file, or none yet; a pipe or device is written into."""
    return path.is_file() or not path.exists()


def _new(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, "a link to itself")
    return target.with_name(f"{target.name}.new")
