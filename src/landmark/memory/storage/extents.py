"""Extents: consecutive blocks of all rows of a layer, in host memory, in a file, or in an archive.

An extent is ``(n, B, G, 2, L, D)``: the keys and values of a block in one key/value head lie
together, and so do blocks that are finished one after another.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from landmark.memory.archive.layer import ArchivedLayer

# Bytes read through one mapping of a file. It is then made anew, so that its pages are given back.
MAPPED_BYTES = 2**24
PAGE = mmap.ALLOCATIONGRANULARITY


class HostAddress(NamedTuple):
    """Where the blocks of an extent lie in host memory.

    Attributes:
        begin: address of the first block of the first row.
        row_bytes: bytes from one row to the next.
        block_bytes: bytes from one block to the next.
    """

    begin: int
    row_bytes: int
    block_bytes: int


class HostExtent:
    """An extent in host memory, pinned where there is CUDA."""

    tier = "host"

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._blocks = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._blocks.nbytes

    def address(self, device: torch.device) -> HostAddress:
        """Returns the address, for kernels of the current stream of ``device``.

        They may read there until this extent is released, and have to end after that.
        """
        # This tells the allocator of pinned memory which stream reads there.
        self._blocks.flatten()[:1].to(device, non_blocking=True)
        block, row, *_ = self._blocks.stride()
        itemsize = self._blocks.itemsize
        return HostAddress(self._blocks.data_ptr(), row * itemsize, block * itemsize)

    def read(self, offsets: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
        """Returns keys and values ``(M, 2, L, D)`` of blocks, rows and heads, ``(M,)`` each."""
        return self._blocks[offsets, rows, heads]

    def whole(self, rows: Tensor) -> Tensor:
        """Returns all blocks of the given rows, ``(n, rows, G, 2, L, D)``."""
        return self._blocks[:, rows]

    def write(self, offset: int, row: int, data: Tensor) -> None:
        """Writes ``data (M, G, 2, L, D)`` to consecutive blocks of a row.

        From a GPU the copy is queued in its current stream.
        """
        to = self._blocks[offset : offset + len(data), row]
        if to.is_contiguous():
            to.copy_(data, non_blocking=True)
        else:
            for one, block in zip(to, data, strict=True):
                one.copy_(block, non_blocking=True)

    def fill(self, data: Tensor) -> None:
        """Writes the whole extent."""
        self._blocks.copy_(data)


class BlockFile:
    """A file of extents of one shape, each at a multiple of the system's page.

    The file has no name: it is gone when nobody reads it any more, also after ``kill -9``.

    Args:
        folder: where it lies, ``None`` for the system's folder of temporary files.
        shape: of an extent.
        dtype: of its numbers.

    Raises:
        ValueError: the folder cannot be written to.
    """

    def __init__(
        self, folder: str | Path | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.extent_bytes = torch.Size(shape).numel() * dtype.itemsize
        self.stride = -(-self.extent_bytes // PAGE) * PAGE
        self.folder = folder or tempfile.gettempdir()
        with _clear_errors(self.folder, self.stride):
            file = tempfile.TemporaryFile(  # noqa: SIM115
                buffering=0, prefix="landmark-", dir=self.folder
            )
        self.handle = file.fileno()
        self.count = 0
        self.free: list[int] = []
        self._map: Tensor | None = None
        self._map_bytes_left = 0
        weakref.finalize(self, file.close)

    def allocate(self) -> int:
        """Returns the number of a new extent: one that is free again, or one at the end.

        Raises:
            ValueError: the disk is full.
        """
        if self.free:
            return self.free.pop()
        with _clear_errors(self.folder, self.stride):
            os.ftruncate(self.handle, (self.count + 1) * self.stride)
        self.count += 1
        return self.count - 1

    def write(self, number: int, offset: int, data: Tensor) -> None:
        """Writes ``data`` at a byte offset of an extent.

        Raises:
            ValueError: the disk is full.
        """
        array = data.contiguous().flatten().view(torch.uint8).numpy()
        left = memoryview(array)  # type: ignore[arg-type]
        begin = number * self.stride + offset
        with _clear_errors(self.folder, len(left)):
            while left:
                written = os.pwrite(self.handle, left, begin)
                left = left[written:]
                begin += written

    def mapped(self, number: int) -> Tensor:
        """Returns an extent as it is mapped; the tensor must not outlive the next call."""
        end = (number + 1) * self.stride
        if self._map is None or self._map_bytes_left <= 0 or len(self._map) < end:
            mapping = mmap.mmap(self.handle, self.count * self.stride)
            self._map = torch.frombuffer(mapping, dtype=torch.uint8)
            self._map_bytes_left = MAPPED_BYTES
        begin = number * self.stride
        return self._map[begin : begin + self.extent_bytes].view(self.dtype).view(self.shape)

    def note_read(self, nbytes: int) -> None:
        """Counts bytes read through the mapping."""
        self._map_bytes_left -= nbytes


@contextlib.contextmanager
def _clear_errors(folder: str | Path, nbytes: int) -> Iterator[None]:
    """Turns an error of the system into one that names the folder, the bytes and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what = f"no room for {nbytes} more bytes of blocks"
            remedy = "make room there"
        else:
            what = "no file can be made for blocks"
            remedy = "see that it is there and writable"
        raise ValueError(
            f"{what} in {str(folder)!r} ({error.strerror}): {remedy} or name another "
            "spill_folder; the cache is as before"
        ) from error


class DiskExtent:
    """An extent in a file."""

    tier = "disk"

    def __init__(self, file: BlockFile) -> None:
        self.file = file
        self.number = file.allocate()
        self._row_bytes = torch.Size(file.shape[2:]).numel() * file.dtype.itemsize

    def __del__(self) -> None:
        if hasattr(self, "number"):
            self.file.free.append(self.number)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.file.extent_bytes

    def read(self, offsets: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
        """See ``HostExtent.read``."""
        found = self.file.mapped(self.number)[offsets, rows, heads]
        self.file.note_read(found.nbytes)
        return found

    def whole(self, rows: Tensor) -> Tensor:
        """See ``HostExtent.whole``."""
        found = self.file.mapped(self.number)[:, rows]
        self.file.note_read(self.nbytes)
        return found

    def write(self, offset: int, row: int, data: Tensor) -> None:
        """See ``HostExtent.write``."""
        batch = self.file.shape[1]
        data = data.cpu()
        parts = (data,) if batch == 1 else data
        for index, part in enumerate(parts):
            row_of_file = (offset + index) * batch + row
            self.file.write(self.number, row_of_file * self._row_bytes, part)

    def fill(self, data: Tensor) -> None:
        """See ``HostExtent.fill``."""
        self.file.write(self.number, 0, data)


class ArchivedExtent:
    """An extent of an archive, of one row: it is read and checked, never written."""

    tier = "disk"

    def __init__(self, saved: ArchivedLayer, begin: int, length: int) -> None:
        self._saved = saved
        self._begin = begin
        self._length = length

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._length * self._saved.block_bytes

    def read(self, offsets: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
        """See ``HostExtent.read``; raises ``Damaged``."""
        return self._saved.read(self._begin + offsets, heads)

    def whole(self, rows: Tensor) -> Tensor:
        """See ``HostExtent.whole``; zeros behind the last block; raises ``Damaged``."""
        blocks = torch.arange(self._begin, min(self._begin + self._length, self._saved.count))
        there = self._saved.of_all_heads(blocks)[:, None]
        found = there.new_zeros(self._length, *there.shape[1:])
        found[: len(there)] = there
        return found[:, rows]


WritableExtent = HostExtent | DiskExtent
Extent = WritableExtent | ArchivedExtent
