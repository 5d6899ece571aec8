"""Extents: some consecutive blocks of all rows of a layer, in the memory of the CPU or in a file.

An extent is ``(n, B, G, 2, L, D)``, so that the keys and values of a block in one key/value head
lie together, and blocks that are finished one after another are written one after another.
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

import torch
from torch import Tensor

from landmark.memory.archive.layer import SavedLayer

MAPPED_BYTES = (
    2**24
)  # read through a mapping before it is made anew, so that its pages do not stay resident
PAGE = mmap.ALLOCATIONGRANULARITY


class HostExtent:
    """An extent in the memory of the CPU, pinned where there is CUDA."""

    tier = "host"

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._blocks = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._blocks.numel() * self._blocks.itemsize

    def address(self, device: torch.device) -> tuple[int, int, int]:
        """Returns where it begins, bytes from one row to the next, and from one block to the next.

        Kernels of the current stream of ``device`` may read there until this extent is let go of,
        and end after that.
        """
        self._blocks.flatten()[:1].to(
            device, non_blocking=True
        )  # so the allocator of pinned memory knows the stream
        block, row, *_ = self._blocks.stride()
        return self._blocks.data_ptr(), row * self._blocks.itemsize, block * self._blocks.itemsize

    def read(self, offsets: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
        """Returns keys and values ``(M, 2, L, D)`` of the given blocks, rows and heads, ``(M,)``
        each.
        """
        return self._blocks[offsets, rows, heads]

    def whole(self, rows: Tensor) -> Tensor:
        """Returns all blocks of the given rows, ``(n, rows, G, 2, L, D)``."""
        return self._blocks[:, rows]

    def write(self, offset: int, row: int, data: Tensor) -> None:
        """Puts ``data (M, G, 2, L, D)`` to consecutive blocks of a row; from a GPU, it arrives with
        its stream.
        """
        to = self._blocks[offset : offset + len(data), row]
        if to.is_contiguous():
            to.copy_(data, non_blocking=True)
        else:
            for one, block in zip(to, data, strict=True):
                one.copy_(block, non_blocking=True)

    def fill(self, data: Tensor) -> None:
        """Puts a whole extent."""
        self._blocks.copy_(data)


class BlockFile:
    """A file of extents of one shape, at multiples of a whole number of pages; gone when nothing
    reads it any more.

    It has no name, so that the system frees it also after kill -9.

    Args:
        folder: where it lies, ``None`` for the system's folder of temporary files.
        shape: of an extent.
        dtype: of its numbers.
    """

    def __init__(
        self, folder: str | Path | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.extent_bytes = torch.Size(shape).numel() * dtype.itemsize
        self.stride = -(-self.extent_bytes // PAGE) * PAGE
        self.folder = folder or tempfile.gettempdir()
        with _refused(self.folder, self.stride):
            file = tempfile.TemporaryFile(  # noqa: SIM115
                buffering=0, prefix="landmark-", dir=self.folder
            )
        self.handle = file.fileno()
        self.places = 0
        self.free: list[int] = []
        self._map: Tensor | None = None
        self._left = 0
        weakref.finalize(self, file.close)

    def allot(self) -> int:
        """Returns the place of a new extent: one that is free again, else at the end."""
        if self.free:
            return self.free.pop()
        with _refused(self.folder, self.stride):
            os.ftruncate(self.handle, (self.places + 1) * self.stride)
        self.places += 1
        return self.places - 1

    def write(self, place: int, offset: int, data: Tensor) -> None:
        """CacheWrites at a byte offset of an extent."""
        array = data.contiguous().flatten().view(torch.uint8).numpy()
        left = memoryview(array)  # type: ignore[arg-type]
        begin = place * self.stride + offset
        with _refused(self.folder, len(left)):
            while left:
                written = os.pwrite(self.handle, left, begin)
                left = left[written:]
                begin = begin + written

    def read(self, place: int) -> Tensor:
        """Returns an extent as it is mapped, to be read and let go of before the next call."""
        if self._map is None or self._left <= 0 or len(self._map) < (place + 1) * self.stride:
            mapped = mmap.mmap(self.handle, self.places * self.stride)
            self._map = torch.frombuffer(mapped, dtype=torch.uint8)
            self._left = MAPPED_BYTES
        begin = place * self.stride
        return self._map[begin : begin + self.extent_bytes].view(self.dtype).view(self.shape)

    def count(self, amount: int) -> None:
        """Told of bytes that were read."""
        self._left -= amount


@contextlib.contextmanager
def _refused(folder: str | Path, wanted: int) -> Iterator[None]:
    """Turns the system's error into one that names the folder and the bytes."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = (
            f"no room for {wanted} more bytes of blocks"
            if full
            else "no file can be made for blocks"
        )
        remedy = "make room there" if full else "see that it is there and writable"
        raise ValueError(
            f"{what} in {str(folder)!r} ({error.strerror}): {remedy} or name another "
            "spill_folder; the cache is as before"
        ) from error


class DiskExtent:
    """An extent in a file."""

    tier = "disk"

    def __init__(self, file: BlockFile) -> None:
        self.file = file
        self.place = file.allot()
        self._row_bytes = torch.Size(file.shape[2:]).numel() * file.dtype.itemsize

    def __del__(self) -> None:
        if hasattr(self, "place"):
            self.file.free.append(self.place)

    @property
    def nbytes(self) -> int:
        """As ``HostExtent``."""
        return self.file.extent_bytes

    def read(self, offsets: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
        """As ``HostExtent``."""
        found = self.file.read(self.place)[offsets, rows, heads]
        self.file.count(found.numel() * found.itemsize)
        return found

    def whole(self, rows: Tensor) -> Tensor:
        """As ``HostExtent``."""
        found = self.file.read(self.place)[:, rows]
        self.file.count(self.nbytes)
        return found

    def write(self, offset: int, row: int, data: Tensor) -> None:
        """As ``HostExtent``."""
        batch = self.file.shape[1]
        data = data.cpu()
        parts = (data,) if batch == 1 else data
        for index, part in enumerate(parts):
            self.file.write(self.place, ((offset + index) * batch + row) * self._row_bytes, part)

    def fill(self, data: Tensor) -> None:
        """As ``HostExtent``."""
        self.file.write(self.place, 0, data)


class SavedExtent:
    """An extent of an archive, of one row: read and checked, never written."""

    tier = "disk"

    def __init__(self, saved: SavedLayer, begin: int, length: int) -> None:
        self._saved = saved
        self._begin = begin
        self._length = length

    @property
    def nbytes(self) -> int:
        """As ``HostExtent``."""
        return self._length * self._saved.block_bytes

    def read(self, offsets: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
        """As ``HostExtent``; raises ``Damaged``."""
        return self._saved.read(self._begin + offsets, heads)

    def whole(self, rows: Tensor) -> Tensor:
        """As ``HostExtent``, zeros behind the last block; raises ``Damaged``."""
        blocks = torch.arange(self._begin, min(self._begin + self._length, self._saved.count))
        there = self._saved.of_all_heads(blocks)[:, None]
        found = there.new_zeros(self._length, *there.shape[1:])
        found[: len(there)] = there
        return found[:, rows]


Written = HostExtent | DiskExtent
Extent = Written | SavedExtent
