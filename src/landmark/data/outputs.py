"""Writes the files and folders of commands, whole or not at all.

Whether they can be written is checked before anything is computed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from landmark.data.errors import first_line

NEW = ".landmark-new"  # the subfolder in which the files of a folder are written first
PIECE = 1 << 20  # bytes written at once where the system cannot reserve a whole file


def require_writable(path: str | Path, name: str) -> None:
    """Makes sure that a file can be written, by writing beside it; leaves everything as it is.

    Args:
        path: path of the file.
        name: name of the parameter, for the message.

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
    """Makes sure that files can be written in a folder, whether it exists or not.

    Args:
        path: path of the folder.
        name: name of the parameter, for the message.

    Raises:
        ValueError: they cannot.
    """
    try:
        with _made(Path(path)):
            require_writable(Path(path) / ".landmark", name)
    except OSError as error:
        raise ValueError(
            f"{name}: expected a folder, got {path} ({_reason(error)}); name another"
        ) from None


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder, and removes what it has made when the context ends."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in missing:
            if each.is_dir():
                each.rmdir()


def write(path: str | Path, data: bytes) -> None:
    """Writes a file whole or leaves the old one; makes its folder.

    Raises:
        OSError: the file cannot be written; the error names it.
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
    """Makes sure that a folder has room for a file, by reserving it for a moment.

    Args:
        folder: path of the folder, which may not exist yet.
        nbytes: bytes of the largest file that is to be written there.
        name: name of the parameter, for the message.

    Raises:
        ValueError: there is no room.
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
    """Adds files to a folder, all of them or none.

    Files that are there stay until the new ones are complete. Weights of a model that was there are
    replaced, all of them.

    Args:
        folder: path of the folder, which may not exist yet.
        save: writes the files into the folder that it is given.

    Raises:
        ValueError: there is no room for the files.
    """
    folder = Path(folder)
    # Files of a model name their folder, so this one has the same name.
    new = folder / NEW / os.path.basename(os.path.abspath(folder))
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
                target = folder / file.relative_to(new)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
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
    """Returns whether an error says that a file could not be written.

    safetensors and torch raise errors of their own for that.
    """
    if isinstance(error, OSError):
        return True
    return type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in str(error)


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileExistsError):
        return "it is none"  # a folder was to be made
    return str(getattr(error, "strerror", None) or error)


def _is_replaced(path: Path) -> bool:
    """Returns whether a path is an ordinary file or nothing yet; pipes and devices are not."""
    return path.is_file() or not path.exists()


def _new(path: Path) -> Path:
    """Returns the file that is written first, beside the file that it replaces."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, "a link to itself")
    return target.with_name(f"{target.name}.new")
