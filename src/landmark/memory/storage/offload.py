"""Offload store: the finished blocks of one layer in host memory, in files, or in an archive."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landmark.memory.archive.layer import ArchivedLayer
from landmark.memory.storage.extents import (
    ArchivedExtent,
    BlockFile,
    DiskExtent,
    Extent,
    HostExtent,
    WritableExtent,
)
from landmark.memory.storage.tiers import OffloadConfig, TransferStats

EXTENT_BYTES = 2**22  # of an extent, at most, unless one block of all rows is larger


class HeldExtent(NamedTuple):
    """An extent of a store.

    Attributes:
        extent: some consecutive blocks.
        rows: ``(B,)`` row of the extent that holds each row of the batch.
        exclusive: whether nobody else reads it; otherwise it is copied before it is written. A
            shared extent stays shared when the others are gone.
    """

    extent: Extent
    rows: Tensor
    exclusive: bool


class Run(NamedTuple):
    """Consecutive blocks of one row in one extent: entries ``begin..end - 1`` of a write."""

    row: int
    block: int
    begin: int
    end: int


class OffloadStore:
    """Finished blocks, in extents of equally many consecutive blocks.

    Extents are copy-on-write: a fork shares those of its origin, and repeated rows share what they
    have in common. Writing a block costs the same however long the text is: no call walks over all
    extents, except where all of them change (another batch, an archive that is opened).

    Args:
        config: budgets of this layer.
        stats: where moved bytes are counted.

    Attributes:
        extent_blocks: blocks of an extent; block ``b`` lies in extent ``b // extent_blocks``.
        extents: by number; those that were dropped are gone.
        file: of the extents on disk, ``None`` before the first.
    """

    def __init__(self, config: OffloadConfig, stats: TransferStats) -> None:
        self.config = config
        self.stats = stats
        self.extent_blocks = 0
        self.extents: dict[int, HeldExtent] = {}
        self.file: BlockFile | None = None
        self._first_extent = 1  # the first that was not dropped; extent 0 never is
        self._end = 0  # behind the last extent
        # Numbers of the extents of each kind, in the order in which they became of this kind.
        self._of_kind: dict[type[Extent], OrderedDict[int, None]] = {
            kind: OrderedDict() for kind in (HostExtent, DiskExtent, ArchivedExtent)
        }
        self._bytes: Counter[str] = Counter()  # of the extents, by tier
        self._pointers: Tensor | None = None  # what `device_pointers` returned
        self._dirty: set[int] = set()  # extents that changed since then
        self._writes_done: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadStore:
        """Returns a fork: both share all extents, and copy one before they write to it."""
        self._share_all()
        fork = OffloadStore(self.config, copy.deepcopy(self.stats, memo))
        memo[id(self)] = fork
        self._wait_for_writes()
        fork.extent_blocks = self.extent_blocks
        fork.extents = dict(self.extents)
        fork._first_extent = self._first_extent
        fork._end = self._end
        fork._of_kind = {kind: each.copy() for kind, each in self._of_kind.items()}
        fork._bytes = self._bytes.copy()
        fork._dirty = self._dirty.copy()
        fork._pointers = None if self._pointers is None else self._pointers.clone()
        return fork

    def write(self, rows: Tensor, blocks: Tensor, data: Tensor, batch: int) -> None:
        """Writes finished blocks, for the first time or once more after a crop.

        Args:
            rows: ``(M,)`` row of each, on the CPU.
            blocks: ``(M,)`` its number, on the CPU.
            data: ``(M, G, 2, L, D)`` its keys and values, on any device.
            batch: rows of the batch.

        Raises:
            ValueError: a budget is full and nothing can move further down, or the disk is full.
        """
        if self.extent_blocks == 0:
            block_bytes = batch * data[0].numel() * data.itemsize
            self.extent_blocks = max(1, EXTENT_BYTES // block_bytes)
        shape = (self.extent_blocks, batch, *data.shape[1:])
        for run in _runs(rows.tolist(), blocks.tolist(), self.extent_blocks):
            extent = self._writable(run.block // self.extent_blocks, shape, data.dtype)
            part = data[run.begin : run.end]
            extent.write(run.block % self.extent_blocks, run.row, part)
            self.stats.count(f"written_{extent.tier}", part.nbytes)
        if data.is_cuda:
            self._writes_done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._writes_done.record()

    def read(self, rows: Tensor, blocks: Tensor, heads: Tensor) -> Tensor:
        """Returns keys and values ``(M, 2, L, D)`` of blocks, rows and key/value heads ``(M,)``.

        Raises:
            Damaged: an archive's block is not what was written.
        """
        return self._gather(rows, blocks, heads, counted=True)

    def peek(self, rows: Tensor, blocks: Tensor, heads: Tensor) -> Tensor:
        """Returns what ``read`` returns, without counting it or copying an archive's blocks."""
        return self._gather(rows, blocks, heads, counted=False)

    def device_pointers(self, device: torch.device) -> Tensor | None:
        """Returns where the blocks lie in host memory, for a kernel to read.

        An archive's blocks are copied to host memory first, where all of them find room.

        Returns:
            ``(extents or more, B, 2)`` int64 on ``device``: of each extent and row the address of
            its first block, and the bytes from one block to the next. The tensor stays at the same
            address until there are more extents than it holds. ``None`` where some blocks lie on
            disk.
        """
        if self._dirty:
            self._copy_archive_to_host()
        if not self.extents or self.nbytes("disk"):
            return None
        if self._pointers is None or len(self._pointers) < self._end:
            self._dirty = set(self.extents)
            shape = (2 * self._end, len(self.extents[0].rows), 2)
            self._pointers = torch.zeros(shape, dtype=torch.int64, device=device)
        if self._dirty:
            dirty = sorted(self._dirty)
            found = torch.stack([self._pointers_of(index, device) for index in dirty])
            self._pointers[torch.tensor(dirty, device=device)] = found.to(device)
            self._dirty.clear()
        return self._pointers

    def resume(self, saved: ArchivedLayer, first: int) -> None:
        """Begins with an archive's blocks of one row: block 0 and those from ``first`` on."""
        self.extent_blocks = max(1, EXTENT_BYTES // saved.block_bytes)
        self.drop(first)
        count = -(-saved.count // self.extent_blocks)
        for index in (*range(min(count, 1)), *range(self._first_extent, count)):
            self._put_archived(index, saved)

    def back_by_archive(self, saved: ArchivedLayer) -> None:
        """Lets the archive that the one row was saved to stand in for files of this store."""
        if saved.count:
            saved.open_blocks()
        for index in list(self._of_kind[DiskExtent]):
            if (index + 1) * self.extent_blocks <= saved.count:
                self._put_archived(index, saved)

    def drop(self, first: int) -> None:
        """Drops the blocks ``1..first - 1``, as far as they fill extents."""
        end = first // self.extent_blocks if self.extent_blocks else 0
        for index in range(self._first_extent, end):
            self._release(index)
        self._first_extent = max(self._first_extent, end)

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered; no block is copied."""
        self.extents = {
            index: each._replace(rows=each.rows[rows]) for index, each in self.extents.items()
        }
        self._share_all()
        self._pointers = None
        self._dirty = set(self.extents)

    def nbytes(self, tier: str) -> int:
        """Returns the bytes of the extents of one tier, those shared with a fork included."""
        return self._bytes[tier]

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` where the store's own bookkeeping contradicts itself."""
        found: Counter[str] = Counter()
        for index, held in self.extents.items():
            found[held.extent.tier] += held.extent.nbytes
            assert index in self._of_kind[type(held.extent)], f"extent {index} is of another kind"
            assert index == 0 or self._first_extent <= index < self._end, f"extent {index} is gone"
        assert sum(map(len, self._of_kind.values())) == len(self.extents), "an extent has two kinds"
        for tier in ("host", "disk"):
            assert self._bytes[tier] == found[tier], f"bytes in tier {tier} are miscounted"
        assert self._dirty <= set(self.extents), "an extent that is gone counts as changed"

    def _gather(self, rows: Tensor, blocks: Tensor, heads: Tensor, *, counted: bool) -> Tensor:
        """Reads blocks, extent by extent."""
        assert len(blocks), "no blocks to read"
        self._wait_for_writes()
        extents = blocks // self.extent_blocks
        found: Tensor | None = None
        for index in torch.unique(extents).tolist():
            here = (extents == index).nonzero()[:, 0]
            extent = self._readable(index) if counted else self.extents[index].extent
            extent_rows = self.extents[index].rows[rows[here]]
            part = extent.read(blocks[here] % self.extent_blocks, extent_rows, heads[here])
            if found is None:
                shape = (len(blocks), *part.shape[1:])
                found = part.new_empty(shape, pin_memory=torch.cuda.is_available())
            found[here] = part
            if counted:
                self.stats.count(f"fetched_{extent.tier}", part.nbytes)
        assert found is not None
        return found

    def _readable(self, index: int) -> Extent:
        """Returns an extent to read; tier ``host`` first copies an archive's, if there is room."""
        extent = self.extents[index].extent
        if self.config.tier != "host" or not isinstance(extent, ArchivedExtent):
            return extent
        if not self._has_host_room(extent.nbytes):
            return extent
        data = extent.whole(self.extents[index].rows)
        on_host = HostExtent(tuple(data.shape), data.dtype)
        self._fill(on_host, data)
        self._put(index, on_host, identity_rows(data.shape[1]), exclusive=True)
        return on_host

    def _has_host_room(self, nbytes: int) -> bool:
        """Returns whether the budget of host memory has room for so many bytes more."""
        budget = self.config.host_bytes
        return budget is None or self.nbytes("host") + nbytes <= budget

    def _copy_archive_to_host(self) -> None:
        """Copies an archive's blocks to host memory, for tier ``host`` and if all find room."""
        on_disk = self.nbytes("disk")
        if on_disk and self.config.tier == "host" and self._has_host_room(on_disk):
            for index in list(self._of_kind[ArchivedExtent]):
                self._readable(index)

    def _pointers_of(self, index: int, device: torch.device) -> Tensor:
        """Returns the pointers ``(B, 2)`` of one extent in host memory."""
        held = self.extents[index]
        assert isinstance(held.extent, HostExtent)
        address = held.extent.address(device)
        begin = address.begin + held.rows * address.row_bytes
        return torch.stack((begin, torch.full_like(held.rows, address.block_bytes)), dim=1)

    def _put_archived(self, index: int, saved: ArchivedLayer) -> None:
        extent = ArchivedExtent(saved, index * self.extent_blocks, self.extent_blocks)
        self._put(index, extent, identity_rows(1), exclusive=False)

    def _put(self, index: int, extent: Extent, rows: Tensor, *, exclusive: bool) -> None:
        """Puts an extent in the place of the one of this number."""
        self._release(index)
        self.extents[index] = HeldExtent(extent, rows, exclusive)
        self._of_kind[type(extent)][index] = None
        self._bytes[extent.tier] += extent.nbytes
        self._end = max(self._end, index + 1)
        self._dirty.add(index)

    def _release(self, index: int) -> None:
        """Drops an extent, if there is one of this number."""
        old = self.extents.pop(index, None)
        if old is not None:
            del self._of_kind[type(old.extent)][index]
            self._bytes[old.extent.tier] -= old.extent.nbytes
            self._dirty.discard(index)

    def _share_all(self) -> None:
        """Marks all extents as read by somebody else, too."""
        self.extents = {
            index: each._replace(exclusive=False) for index, each in self.extents.items()
        }

    def _writable(self, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> WritableExtent:
        """Returns an extent to write to: a copy, where somebody else reads it."""
        old = self.extents.get(index)
        if old is not None and old.exclusive and not isinstance(old.extent, ArchivedExtent):
            return old.extent
        self._wait_for_writes()
        new = self._allocate(shape, dtype)
        old = self.extents.get(index)  # it may have moved to disk to make room
        if old is not None:
            self._fill(new, old.extent.whole(old.rows))
        self._put(index, new, identity_rows(shape[1]), exclusive=True)
        return new

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> WritableExtent:
        """Returns an empty extent in the highest tier that has room or can make room."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        budget = self.config.host_bytes
        if self.config.tier == "disk" and (budget is None or budget < nbytes):
            return DiskExtent(self._file_for(shape, dtype))
        while not self._has_host_room(nbytes):
            if self.config.tier == "host":
                raise ValueError(
                    f"host_bytes: expected room for {self.nbytes('host') + nbytes} bytes in each "
                    f"layer, got {budget}: give more or use tier='disk'"
                )
            self._spill_oldest()
        return HostExtent(shape, dtype)

    def _spill_oldest(self) -> None:
        """Moves the extent that has been in host memory for longest to disk."""
        index = next(iter(self._of_kind[HostExtent]))
        held = self.extents[index]
        data = held.extent.whole(held.rows)
        on_disk = DiskExtent(self._file_for(tuple(data.shape), data.dtype))
        self._fill(on_disk, data)
        self._put(index, on_disk, identity_rows(data.shape[1]), exclusive=True)

    def _fill(self, extent: WritableExtent, data: Tensor) -> None:
        """Writes a whole extent."""
        extent.fill(data)
        self.stats.count(f"written_{extent.tier}", data.nbytes)

    def _file_for(self, shape: tuple[int, ...], dtype: torch.dtype) -> BlockFile:
        if self.file is None or self.file.shape != shape:
            self.file = BlockFile(self.config.spill_folder, shape, dtype)
        return self.file

    def _wait_for_writes(self) -> None:
        """Waits until copies from a GPU have arrived."""
        if self._writes_done is not None:
            self._writes_done.synchronize()
            self._writes_done = None


@cache
def identity_rows(rows: int) -> Tensor:
    """Returns ``0..rows - 1``: one tensor for all extents, never written to."""
    return torch.arange(rows, device="cpu")


def _runs(rows: list[int], blocks: list[int], extent_blocks: int) -> Iterator[Run]:
    """Cuts a write where the row changes, blocks do not follow each other, or an extent begins."""
    begin = 0
    for end in range(1, len(rows) + 1):
        goes_on = (
            end < len(rows)
            and rows[end] == rows[begin]
            and blocks[end] == blocks[end - 1] + 1
            and blocks[end] % extent_blocks != 0
        )
        if not goes_on:
            yield Run(rows[begin], blocks[begin], begin, end)
            begin = end
