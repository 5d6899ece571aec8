"""A memory on disk: a folder of append-only files, and one small file that says how far they count.

``memory.json`` holds what the memory is, and for every append-only file, called a stream here, how
many bytes were committed and their checksum. A writer appends to streams, flushes them to disk and
then replaces ``memory.json`` in one step. After a crash there is either the old state or the new
one: bytes of a stream beyond its committed length were being written and count as nothing.

A change of any committed byte is found. ``memory.json`` has a checksum of its own. A stream has one
over all its bytes or, where it is read in parts, one for each part (``sums`` of ``layer.py``).
"""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "landmark's memory expects a POSIX system such as Linux or macOS, got one without fcntl; "
        "on Windows use WSL"
    ) from None

FORMAT = 1
STATE = "memory.json"
NEW = "memory.json.new"
LOCK = "lock"
STREAMS = re.compile(r"layer-\d+\.(blocks|landmarks|sums)|tail-\d+|text-ids|kept-\w+")
REMEDY = "restore it from a copy, or remember the texts anew"


class Damaged(ValueError):
    """A memory on disk is not what was written."""


class Archive:
    """A folder opened for reading, or with ``lock`` for writing.

    Args:
        folder: where it lies.
        state: what ``memory.json`` says.

    Attributes:
        folder: the absolute path, so that a change of the working directory changes nothing.
        manifest: what the memory is, as committed last.
        commits: how often something was committed.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder = folder.absolute()
        self._handles: dict[str, int] = {}
        self._lock: int | None = None
        self._take(state)

    def _take(self, state: dict[str, Any]) -> None:
        """Goes by a committed state."""
        self._state = state
        self.manifest = state["manifest"]
        self.commits = state["commits"]
        self._lengths: dict[str, int] = {
            name: each["bytes"] for name, each in state["streams"].items()
        }
        self._sums: dict[str, int | None] = {
            name: each["crc32"] for name, each in state["streams"].items()
        }

    @classmethod
    def create(cls, folder: str | Path) -> Archive:
        """Makes an empty archive that is locked for writing; there is something to open from the
        first commit on.

        Raises:
            ValueError: the folder holds something else than what an interrupted first writer left,
                or as ``lock``.
        """
        require_free(Path(folder))
        archive = cls(Path(folder), _nothing())
        made = [each for each in (archive.folder, *archive.folder.parents) if not each.exists()]
        try:
            archive.folder.mkdir(parents=True, exist_ok=True)
            for each in made:
                _sync(each.parent)
        except OSError as error:
            raise archive._refused(error) from error
        archive.lock()
        return archive

    @classmethod
    def open(cls, folder: str | Path, *, whole: bool = True) -> Archive:
        """Opens an archive for reading, by what was committed last.

        Args:
            folder: where it lies.
            whole: whether one with streams that are too short is refused.

        Raises:
            FileNotFoundError: there is no memory in the folder.
            Damaged: ``memory.json`` is not what was written, or a stream is shorter than it says.
            ValueError: a format of a later version.
        """
        archive = cls(Path(folder), _read_state(Path(folder)))
        short = [line for name in archive.streams() for line in archive._shorter(name) if whole]
        if short and archive.is_outdated():
            return cls.open(folder, whole=whole)
        if short:
            raise Damaged(short[0])
        return archive

    def is_outdated(self) -> bool:
        """Whether somebody has committed since this archive was opened: streams that it goes by may
        be gone.
        """
        return _read_state(self.folder) != self._state

    def lock(self) -> None:
        """Makes this archive its folder's only writer, and cuts off what an interrupted writer
        left.

        Raises:
            FileNotFoundError: the folder was moved, removed or emptied since this archive was
                opened.
            ValueError: there is another writer, somebody has committed since this archive was
                opened, or the folder cannot be written to.
        """
        if self._lock is not None:
            return
        self._check_nobody_wrote()
        try:
            handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._refused(error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise ValueError(
                f"{str(self.folder)!r} is being written by another process; wait for it, reading "
                "is free"
            ) from None
        self._lock = handle
        try:
            self._check_nobody_wrote()
            self.roll_back()
        except BaseException:
            self.unlock()
            raise

    def _check_nobody_wrote(self) -> None:
        there = self._there()
        if there == self._state:
            return
        if there["commits"] == 0:
            raise FileNotFoundError(
                f"expected the memory that was opened in {str(self.folder)!r}, found none any "
                "more: put the folder back, or save to a new one"
            )
        raise ValueError(
            f"{str(self.folder)!r} was written to since it was opened (commit {there['commits']}, "
            f"not {self.commits}); open it again, or save to a new folder"
        )

    def check_whole(self) -> None:
        """Raises ``Damaged`` where a stream is shorter than what was committed: what is appended
        would stand alone.
        """
        short = [line for name in self.streams() for line in self._shorter(name)]
        if short:
            raise Damaged(f"{short[0]}; what is in memory can be saved to a new folder")

    def _there(self) -> dict[str, Any]:
        """What is committed in the folder now."""
        return _read_state(self.folder) if (self.folder / STATE).exists() else _nothing()

    def unlock(self) -> None:
        """Lets others write."""
        self._close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def roll_back(self) -> None:
        """Undoes what was appended since the last commit, by this writer or one that was
        interrupted.

        What the folder says is asked for anew: a commit may have been interrupted after it took
        place.
        """
        self._close()
        there = self._there()
        if there["commits"] < self.commits:  # the folder was taken away meanwhile
            self._take(self._state)
            return
        self._take(there)
        left = self.leftover()
        if left:
            _sync(self.folder)  # what is removed below was replaced for good
        for name in left:
            path = self.folder / name
            if name not in self._lengths:
                path.unlink()
            else:
                os.truncate(path, self._lengths[name])

    def streams(self) -> dict[str, int]:
        """Returns the bytes of each stream."""
        return dict(self._lengths)

    def leftover(self) -> dict[str, int]:
        """Bytes on the disk that are not committed, by file: what is being written, or was when it
        was interrupted.
        """
        names = sorted(
            each.name for each in self.folder.iterdir() if _is_ours(each.name) and each.name != LOCK
        )
        found = {name: _size(self.folder / name) - self.length(name) for name in names}
        return {
            name: extra for name, extra in found.items() if extra > 0 or name not in self._lengths
        }

    def length(self, name: str) -> int:
        """Bytes of a stream, those appended and not yet committed included."""
        return self._lengths.get(name, 0)

    def append(self, name: str, data: bytes | memoryview, *, summed: bool = True) -> None:
        """Writes behind a stream.

        Args:
            name: the stream's file.
            data: the bytes.
            summed: whether the stream has one checksum over all its bytes; otherwise the caller
                keeps checksums.
        """
        begin = self.length(name)
        left = memoryview(data).cast("B")
        try:
            handle = self._handle(name)
            while left:
                written = os.pwrite(handle, left, begin)
                left = left[written:]
                begin = begin + written
        except OSError as error:
            raise self._refused(error, len(left)) from error
        self._lengths[name] = begin
        self._sums[name] = zlib.crc32(data, self._sums.get(name) or 0) if summed else None

    def skip(self, name: str, count: int) -> None:
        """Goes on ``count`` bytes further in a stream without a checksum; zeros are read there,
        which take no room.
        """
        try:
            os.ftruncate(self._handle(name), self.length(name) + count)
        except OSError as error:
            raise self._refused(error, count) from error
        self._lengths[name] = self.length(name) + count
        self._sums[name] = None

    def _handle(self, name: str) -> int:
        assert self._lock is not None, "an archive is locked before it is written"
        if name not in self._handles:
            self._handles[name] = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT, 0o666)
        return self._handles[name]

    def commit(self, manifest: dict[str, Any], *, dropped: tuple[str, ...] = ()) -> None:
        """Makes what was appended count, all of it or, after a crash, nothing.

        Args:
            manifest: what the memory is now.
            dropped: streams that count no more.
        """
        assert self._lock is not None, "an archive is locked before it is written"
        kept = sorted(self._lengths.keys() - set(dropped))
        streams = {name: {"bytes": self._lengths[name], "crc32": self._sums[name]} for name in kept}
        state = {
            "format": FORMAT,
            "commits": self.commits + 1,
            "manifest": manifest,
            "streams": streams,
        }
        try:
            for handle in self._handles.values():
                os.fsync(handle)
            _write_state(self.folder, state)
        except OSError as error:
            raise self._refused(error, len(_file_of(state))) from error
        self._take(json.loads(_encoded(state)))
        for name in dropped:
            if name in self._handles:
                os.close(self._handles.pop(name))
            (self.folder / name).unlink(missing_ok=True)

    def _refused(self, error: OSError, wanted: int = 0) -> ValueError:
        """The system's error as one that names the folder and, where there is no room, the
        bytes.
        """
        before = (
            "what was committed before can be opened as it was"
            if self.commits
            else "nothing was committed before"
        )
        folder = f"{str(self.folder)!r} ({error.strerror})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return ValueError(
                f"no room for {wanted} more bytes in {folder}: make room there or name another "
                f"folder; {before}"
            )
        return ValueError(
            f"cannot write to {folder}: make it writable or name another folder; {before}"
        )

    def read(self, name: str) -> bytearray:
        """Returns a summed stream's committed bytes.

        Raises:
            Damaged: they are not what was written.
        """
        path = self.folder / name
        if name not in self._lengths:
            raise Damaged(f"{path}: it is not among what was written; {REMEDY}")
        data = bytearray(self._lengths[name])
        try:
            with open(path, "rb") as file:
                found = file.readinto(data)
        except FileNotFoundError:
            raise Damaged(
                f"{path}: it is not there any more; put the folder back, or {REMEDY}"
            ) from None
        if found != len(data) or zlib.crc32(data) != self._sums[name]:
            raise Damaged(f"{path}: the checksum is not that of what was written; {REMEDY}")
        return data

    def verify(self) -> Iterator[str]:
        """Yields a line for each stream that is too short, and each summed one that is not what was
        written.
        """
        for name, total in self._sums.items():
            found = list(self._shorter(name))
            try:
                if total is not None and not found:
                    self.read(name)
            except (Damaged, OSError) as error:
                found.append(str(error))
            yield from found

    def _shorter(self, name: str) -> Iterator[str]:
        found = _size(self.folder / name)
        if found < self._lengths[name]:
            path = self.folder / name
            yield f"{path}: expected {self._lengths[name]} bytes, got {found}; {REMEDY}"


def require_free(folder: Path) -> None:
    """Raises ``ValueError`` for a folder that holds something else than what an interrupted first
    writer left.
    """
    if folder.exists() and not _is_free(folder):
        raise ValueError(
            f"expected a new or empty folder for a memory, got {str(folder)!r}; name another, or "
            "open it"
        )


def _is_free(folder: Path) -> bool:
    """Whether a folder is empty, or holds only what a writer left that was interrupted before its
    first commit.
    """
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else [folder.name]
    return not names or (LOCK in names and all(map(_is_ours, names)))


def _is_ours(name: str) -> bool:
    """Whether a file is one that writers append to, replace or remove; all others of the folder are
    left alone.
    """
    return name in (NEW, LOCK) or STREAMS.fullmatch(name) is not None


def _nothing() -> dict[str, Any]:
    """The state before the first commit."""
    return {"format": FORMAT, "commits": 0, "manifest": {}, "streams": {}}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if not path.is_file():
        begun = (
            ", only what a writer left that was interrupted before its first commit"
            * (folder / LOCK).exists()
        )
        raise FileNotFoundError(
            f"expected a memory with a file {STATE} in {str(folder)!r}, found none{begun}; see "
            "LandmarkCache.save"
        )
    data = path.read_bytes()
    try:
        body = json.loads(data)["state"]
        whole = data == _file_of(body) and _is_state(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if whole and body["format"] != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, got {body['format']}; install the landmark that "
            "wrote it"
        )
    if not whole or not all(STREAMS.fullmatch(name) for name in body["streams"]):
        raise Damaged(f"{path}: it is not what was written; {REMEDY}")
    return dict(body)


def _is_state(body: dict[str, Any]) -> bool:
    """Whether it has the parts of a state, or is of another format, whose parts may be others."""
    if body["format"] != FORMAT:
        return True
    sizes = [each["bytes"] for each in body["streams"].values()]
    sums = [each["crc32"] or 0 for each in body["streams"].values()]
    numbers = [body["commits"], *sizes, *sums]
    return isinstance(body["manifest"], dict) and all(
        type(each) is int and each >= 0 for each in numbers
    )


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _file_of(body: dict[str, Any]) -> bytes:
    return (
        json.dumps(
            {"crc32": zlib.crc32(_encoded(body)), "state": body}, indent=1, sort_keys=True
        ).encode()
        + b"\n"
    )


def _write_state(folder: Path, body: dict[str, Any]) -> None:
    """Replaces ``memory.json`` in one step, on the disk before this returns."""
    _sync(folder)  # new streams have their names on the disk before anything speaks of them
    with open(folder / NEW, "wb") as file:
        file.write(_file_of(body))
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / NEW, folder / STATE)
    _sync(folder)


def _sync(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
