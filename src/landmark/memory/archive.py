"""A memory on disk: a folder of files that only grow, and one small file, replaced whole, that says how far they count.

``memory.json`` holds what the memory is, and for every stream (a file of its own) how many bytes were committed and
their checksum. A writer appends to streams, flushes them to the disk and then replaces ``memory.json`` in one step, so
that after a crash there is either the old state or the new one; what lies in a stream beyond its committed length was
being written and counts as nothing. A change of any committed byte is found: ``memory.json`` has a checksum of its own,
streams have one over all their bytes or, where they are read in parts, one for each part (``sums`` of ``blocks.py``).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

FORMAT = 1
STATE = "memory.json"
LOCK = "lock"
OURS = re.compile(r"layer-\d+\.(blocks|landmarks|sums)|tail-\d+|text-\w+|memory\.json\.new|lock")
REMEDY = "restore it from a copy, or remember the texts anew"


class Damaged(ValueError):
    """A memory on disk is not what was written."""


class Archive:
    """A folder opened for reading, or with ``lock`` for writing.

    Args:
        folder: where it lies.
        state: what ``memory.json`` says.

    Attributes:
        manifest: what the memory is, as committed last.
        commits: how often something was committed.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder, self.manifest, self.commits = folder, state["manifest"], state["commits"]
        self._lengths: dict[str, int] = {name: each["bytes"] for name, each in state["streams"].items()}
        self._sums: dict[str, int | None] = {name: each["crc32"] for name, each in state["streams"].items()}
        self._committed = dict(self._lengths), dict(self._sums)
        self._handles: dict[str, int] = {}
        self._lock: int | None = None

    @classmethod
    def create(cls, folder: str | Path, manifest: dict[str, Any]) -> Archive:
        """Makes an empty archive that is locked for writing; there is something to open from the first commit on.

        Raises:
            FileExistsError: the folder holds something else than what an interrupted first writer left.
            ValueError: as ``lock``.
        """
        folder = Path(folder)
        if folder.exists() and not all(OURS.fullmatch(each.name) for each in folder.iterdir()):
            raise FileExistsError(f"expected a new or empty folder for a memory, got {str(folder)!r}; name another")
        folder.mkdir(parents=True, exist_ok=True)
        archive = cls(folder, {"manifest": manifest, "commits": 0, "streams": {}})
        archive.lock()
        return archive

    @classmethod
    def open(cls, folder: str | Path) -> Archive:
        """Opens an archive for reading, by what was committed last.

        Raises:
            FileNotFoundError: there is no memory in the folder.
            Damaged: ``memory.json`` is not what was written, or a stream is shorter than it says.
            ValueError: a format of a later version.
        """
        folder = Path(folder)
        archive = cls(folder, _state(folder))
        for name, length in archive._lengths.items():
            found = _size(folder / name)
            if found < length:
                raise Damaged(f"{folder / name}: expected {length} bytes, got {found}; {REMEDY}")
        return archive

    def lock(self) -> None:
        """Makes this archive its folder's only writer, and cuts off what an interrupted writer left.

        Raises:
            ValueError: there is another writer, or somebody has committed since this archive was opened.
        """
        if self._lock is not None:
            return
        handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise ValueError(
                f"{str(self.folder)!r} is being written by another process; wait for it, reading is free"
            ) from None
        there = _state(self.folder)["commits"] if (self.folder / STATE).exists() else 0
        if there != self.commits:
            os.close(handle)
            raise ValueError(
                f"{str(self.folder)!r} was written to since it was opened (commit {there}, not {self.commits}); "
                "open it again"
            )
        self._lock = handle
        self.roll_back()

    def unlock(self) -> None:
        """Lets others write."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def roll_back(self) -> None:
        """Undoes what was appended since the last commit, by this writer or one that was interrupted."""
        self._lengths, self._sums = dict(self._committed[0]), dict(self._committed[1])
        for path in self.folder.iterdir():
            if path.name in self._lengths:
                os.truncate(path, self._lengths[path.name])
            elif OURS.fullmatch(path.name) and path.name != LOCK:
                path.unlink()
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def leftover(self) -> dict[str, int]:
        """Bytes behind the committed ones, by stream: what was being written when a writer was interrupted."""
        found = {name: _size(self.folder / name) - length for name, length in self._lengths.items()}
        return {name: extra for name, extra in found.items() if extra > 0}

    def length(self, name: str) -> int:
        """Bytes of a stream, those appended and not yet committed included."""
        return self._lengths.get(name, 0)

    def append(self, name: str, data: bytes | memoryview, *, summed: bool = True) -> None:
        """Writes behind a stream.

        Args:
            name: the stream's file.
            data: the bytes.
            summed: whether the stream has one checksum over all its bytes; otherwise the caller keeps checksums.
        """
        assert self._lock is not None, "an archive is locked before it is written"
        if name not in self._handles:
            self._handles[name] = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT, 0o666)
        begin, left = self.length(name), memoryview(data).cast("B")
        while left:
            try:
                written = os.pwrite(self._handles[name], left, begin)
            except OSError as error:
                raise self._full(error, len(left)) from error
            left, begin = left[written:], begin + written
        self._lengths[name] = begin
        self._sums[name] = zlib.crc32(data, self._sums.get(name) or 0) if summed else None

    def commit(self, manifest: dict[str, Any], *, dropped: tuple[str, ...] = ()) -> None:
        """Makes what was appended count, all of it or, after a crash, nothing.

        Args:
            manifest: what the memory is now.
            dropped: streams that count no more.
        """
        assert self._lock is not None, "an archive is locked before it is written"
        for name in dropped:
            self._lengths.pop(name, None)
            self._sums.pop(name, None)
        streams = {name: {"bytes": size, "crc32": self._sums[name]} for name, size in sorted(self._lengths.items())}
        state = {"format": FORMAT, "commits": self.commits + 1, "manifest": manifest, "streams": streams}
        try:
            for handle in self._handles.values():
                os.fsync(handle)
            _write_state(self.folder, state)
        except OSError as error:
            raise self._full(error, len(_file_of(state))) from error
        self.manifest, self.commits = manifest, self.commits + 1
        self._committed = dict(self._lengths), dict(self._sums)
        for name in dropped:
            if name in self._handles:
                os.close(self._handles.pop(name))
            (self.folder / name).unlink(missing_ok=True)

    def _full(self, error: OSError, wanted: int) -> ValueError:
        """The system's error as one that names the folder and the bytes; other errors stay what they are."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise error
        return ValueError(
            f"no room for {wanted} more bytes in {str(self.folder)!r} ({error.strerror}): make room there or name "
            f"another folder; what was committed ({sum(self._committed[0].values())} bytes) can be opened as before"
        )

    def read(self, name: str) -> bytes:
        """Returns a summed stream's committed bytes.

        Raises:
            Damaged: they are not what was written.
        """
        path, length = self.folder / name, self._lengths[name]
        with open(path, "rb") as file:
            data = file.read(length)
        if len(data) != length or zlib.crc32(data) != self._sums[name]:
            raise Damaged(f"{path}: the checksum is not that of what was written; {REMEDY}")
        return data

    def verify(self) -> list[str]:
        """Returns a line for each summed stream that is not what was written."""
        found = []
        for name, total in self._sums.items():
            try:
                if total is not None:
                    self.read(name)
            except (Damaged, OSError) as error:
                found.append(str(error))
        return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a memory with a file {STATE} in {str(folder)!r}, found none; see landmark remember"
        )
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        body, known = state["state"], state["crc32"]
        whole = zlib.crc32(_encoded(body)) == known and path.read_bytes() == _file_of(body)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"{path}: it is not what was written; {REMEDY}")
    if body["format"] != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {body['format']}; install the landmark that wrote it")
    return dict(body)


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _file_of(body: dict[str, Any]) -> bytes:
    return json.dumps({"crc32": zlib.crc32(_encoded(body)), "state": body}, indent=1, sort_keys=True).encode() + b"\n"


def _write_state(folder: Path, body: dict[str, Any]) -> None:
    """Replaces ``memory.json`` in one step, on the disk before this returns."""
    new = folder / f"{STATE}.new"
    with open(new, "wb") as file:
        file.write(_file_of(body))
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, folder / STATE)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
