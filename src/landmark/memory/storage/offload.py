"""What lies below the device: the finished blocks of one layer, by block number."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landmark.memory.archive.layer import SavedLayer
from landmark.memory.storage.extents import (
    BlockFile,
    DiskExtent,
    Extent,
    HostExtent,
    SavedExtent,
    Written,
)
from landmark.memory.storage.tiers import OffloadConfig, TransferStats

EXTENT_BYTES = 2**22  # of an extent, at most, unless one block of all rows is larger


class Held(NamedTuple):
    """An extent of a shelf.

    Attributes:
        extent: some consecutive blocks.
        rows: ``(B,)`` where in it each row of the batch lies.
        own: whether nobody else reads it.
    """

    extent: Extent
    rows: Tensor
    own: bool


class OffloadStore:
    """Finished blocks in extents of equal length; block ``b`` lies in extent ``b // length``.

    A fork shares extents with its origin, and rows that were repeated share what they have in
    common: an extent that somebody else may read is copied before it is written. No call walks over
    all extents, so that a text without end costs the same for each block, but for what concerns all
    of them: another batch, and what is opened from an archive.

    Args:
        tiers: budgets of this layer.
        traffic: where moved bytes are counted.
    """

    def __init__(self, tiers: OffloadConfig, traffic: TransferStats) -> None:
        self.tiers = tiers
        self.traffic = traffic
        self.length = 0  # blocks of an extent
        self.held: dict[int, Held] = {}  # by number of the extent; those that were dropped are gone
        self._kept = 1  # the first extent that was not dropped, but for extent 0
        self._end = 0  # behind the last extent
        self._kinds: dict[
            type[Extent], OrderedDict[int, None]
        ]  # extents of each kind, as they came to be of it
        self._kinds = {kind: OrderedDict() for kind in (HostExtent, DiskExtent, SavedExtent)}
        self.file: BlockFile | None = None
        self._bytes: Counter[str] = Counter()  # of the extents, by tier
        self._addresses: Tensor | None = None  # as `addresses` gives them
        self._moved: set[int] = set()  # extents, since then
        self._arriving: torch.cuda.Event | None = None  # when what was written will be there

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadStore:
        """A fork: both share what there is and write no more into it."""
        self._share()
        fork = OffloadStore(self.tiers, copy.deepcopy(self.traffic, memo))
        memo[id(self)] = fork
        self._arrive()
        fork.length = self.length
        fork._kept = self._kept
        fork._end = self._end
        fork.held = dict(self.held)
        fork._kinds = {kind: each.copy() for kind, each in self._kinds.items()}
        fork._bytes = self._bytes.copy()
        fork._moved = self._moved.copy()
        fork._addresses = None if self._addresses is None else self._addresses.clone()
        return fork

    def write(self, rows: Tensor, blocks: Tensor, data: Tensor, batch: int) -> None:
        """Files finished blocks, all of them for the first time or once more after a crop.

        Args:
            rows: ``(M,)`` row of each.
            blocks: ``(M,)`` its number.
            data: ``(M, G, 2, L, D)`` its keys and values, on any device.
            batch: rows there are.

        Raises:
            ValueError: a budget that nothing can move down from is full, or the disk.
        """
        if self.length == 0:
            self.length = max(1, EXTENT_BYTES // (batch * data[0].numel() * data.itemsize))
        shape = (self.length, batch, *data.shape[1:])
        for row, block, begin, end in _runs(rows.tolist(), blocks.tolist(), self.length):
            extent = self._writable(block // self.length, shape, data.dtype)
            part = data[begin:end]
            extent.write(block % self.length, row, part)
            self.traffic.count(f"written_{extent.tier}", part.numel() * data.itemsize)
        if data.is_cuda:
            self._arriving = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arriving.record()

    def _arrive(self) -> None:
        """Waits for what a GPU still writes."""
        if self._arriving is not None:
            self._arriving.synchronize()
            self._arriving = None

    def read(self, rows: Tensor, blocks: Tensor, heads: Tensor) -> Tensor:
        """Returns keys and values ``(M, 2, L, D)`` of the blocks ``(M,)`` of given rows and
        key/value heads.
        """
        self._arrive()
        found: Tensor | None = None
        for index in torch.unique(blocks // self.length).tolist():
            here = (blocks // self.length == index).nonzero()[:, 0]
            extent = self._readable(index)
            part = extent.read(
                blocks[here] % self.length, self.held[index].rows[rows[here]], heads[here]
            )
            if found is None:
                found = part.new_empty(
                    len(blocks), *part.shape[1:], pin_memory=torch.cuda.is_available()
                )
            found[here] = part
            self.traffic.count(f"fetched_{extent.tier}", part.numel() * part.itemsize)
        assert found is not None, "no blocks"
        return found

    def addresses(self, device: torch.device) -> Tensor | None:
        """Returns where blocks lie in the memory of the CPU, for a kernel to read, or ``None``
        where some lie lower.

        Where an archive's blocks all find room there, they are brought first.

        Returns:
            ``(extents or more, B, 2)`` int64 on ``device``: of each extent and row the address of
            its first block, and the bytes from one to the next; at the same place until there are
            more extents than fit.
        """
        if self._moved:
            self._bring_all()
        if not self.held or self.nbytes("disk"):
            return None
        if self._addresses is None or len(self._addresses) < self._end:
            self._moved = set(self.held)
            shape = (2 * self._end, len(self.held[0].rows), 2)
            self._addresses = torch.zeros(shape, dtype=torch.int64, device=device)
        if self._moved:
            moved = sorted(self._moved)
            found = torch.stack([self._address(index, device) for index in moved])
            self._addresses[torch.tensor(moved, device=device)] = found.to(device)
            self._moved.clear()
        return self._addresses

    def _bring_all(self) -> None:
        """For tier ``host``, copies an archive's blocks to the memory of the CPU if the budget has
        room for all.
        """
        lower = self.nbytes("disk")
        budget = self.tiers.host_bytes
        if (
            lower
            and self.tiers.tier == "host"
            and (budget is None or self.nbytes("host") + lower <= budget)
        ):
            for index in list(self._kinds[SavedExtent]):
                self._readable(index)

    def _address(self, index: int, device: torch.device) -> Tensor:
        """Of one extent in the memory of the CPU, ``(B, 2)``."""
        extent, rows, _ = self.held[index]
        assert isinstance(extent, HostExtent)
        begin, row_bytes, block_bytes = extent.address(device)
        return torch.stack((begin + rows * row_bytes, torch.full_like(rows, block_bytes)), dim=1)

    def resume(self, saved: SavedLayer, first: int) -> None:
        """Begins with an archive's blocks of one row: block 0 and those from ``first`` on."""
        self.length = max(1, EXTENT_BYTES // saved.block_bytes)
        self.drop(first)
        count = -(-saved.count // self.length)
        for index in (*range(min(count, 1)), *range(self._kept, count)):
            self._put_saved(index, saved)

    def adopt(self, saved: SavedLayer) -> None:
        """Lets the archive that one row was saved to hold its blocks in place of files of the
        shelf's own.
        """
        if saved.count:
            saved.hold()
        for index in list(self._kinds[DiskExtent]):
            if (index + 1) * self.length <= saved.count:
                self._put_saved(index, saved)

    def _put_saved(self, index: int, saved: SavedLayer) -> None:
        self._put(
            index, SavedExtent(saved, index * self.length, self.length), in_order(1), own=False
        )

    def drop(self, first: int) -> None:
        """Lets go of blocks ``1..first - 1``, as far as they fill extents."""
        end = first // self.length if self.length else 0
        for index in range(self._kept, end):
            self._let_go(index)
        self._kept = max(self._kept, end)

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered; nothing is moved."""
        self.held = {
            index: each._replace(rows=each.rows[rows]) for index, each in self.held.items()
        }
        self._share()
        self._move_all()

    def nbytes(self, tier: str) -> int:
        """Bytes of the extents of one tier, those shared with a fork included."""
        return self._bytes[tier]

    def _readable(self, index: int) -> Extent:
        """An extent to read from; for tier ``host`` one of an archive is copied there, if the
        budget has room.
        """
        (extent, rows, _) = self.held[index]
        budget = self.tiers.host_bytes
        if self.tiers.tier != "host" or not isinstance(extent, SavedExtent):
            return extent
        if budget is not None and self.nbytes("host") + extent.nbytes > budget:
            return extent
        data = extent.whole(rows)
        near = HostExtent(tuple(data.shape), data.dtype)
        self._fill(near, data)
        self._put(index, near, in_order(data.shape[1]), own=True)
        return near

    def _put(self, index: int, extent: Extent, rows: Tensor, *, own: bool) -> None:
        self._let_go(index)
        self.held[index] = Held(extent, rows, own)
        self._kinds[type(extent)][index] = None
        self._bytes[extent.tier] += extent.nbytes
        self._end = max(self._end, index + 1)
        self._moved.add(index)

    def _let_go(self, index: int) -> None:
        old = self.held.pop(index, None)
        if old is not None:
            del self._kinds[type(old.extent)][index]
            self._bytes[old.extent.tier] -= old.extent.nbytes
            self._moved.discard(index)

    def _share(self) -> None:
        """From now on others may read what there is."""
        self.held = {index: each._replace(own=False) for index, each in self.held.items()}

    def _move_all(self) -> None:
        """Lets all addresses be asked for anew, for a batch of any size."""
        self._addresses, self._moved = None, set(self.held)

    def _writable(self, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> Written:
        old = self.held.get(index)
        if old is not None and old.own and not isinstance(old.extent, SavedExtent):
            return old.extent
        self._arrive()
        new = self._allot(shape, dtype)
        old = self.held.get(index)  # which may have moved down to make room
        if old is not None:
            self._fill(new, old.extent.whole(old.rows))
        self._put(index, new, in_order(shape[1]), own=True)
        return new

    def _allot(self, shape: tuple[int, ...], dtype: torch.dtype) -> Written:
        """Returns an empty extent in the highest tier whose budget has room for it, or can make
        room.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        budget = self.tiers.host_bytes
        if self.tiers.tier == "disk" and (budget is None or budget < size):
            return DiskExtent(self._file(shape, dtype))
        while budget is not None and self.nbytes("host") + size > budget:
            if self.tiers.tier == "host":
                raise ValueError(
                    f"host_bytes: expected room for {self.nbytes('host') + size} bytes in each "
                    f"layer, got {budget}: give more or use tier='disk'"
                )
            self._move_down()
        return HostExtent(shape, dtype)

    def _move_down(self) -> None:
        """Moves the extent that has been on the host for longest to the disk."""
        index = next(iter(self._kinds[HostExtent]))
        data = self.held[index].extent.whole(self.held[index].rows)
        new = DiskExtent(self._file(tuple(data.shape), data.dtype))
        self._fill(new, data)
        self._put(index, new, in_order(data.shape[1]), own=True)

    def _fill(self, extent: Written, data: Tensor) -> None:
        extent.fill(data)
        self.traffic.count(f"written_{extent.tier}", data.numel() * data.itemsize)

    def _file(self, shape: tuple[int, ...], dtype: torch.dtype) -> BlockFile:
        if self.file is None or self.file.shape != shape:
            self.file = BlockFile(self.tiers.spill_folder, shape, dtype)
        return self.file


@cache
def in_order(rows: int) -> Tensor:
    """Returns the rows of an extent that nobody has reordered: one tensor for all, never written
    to.
    """
    return torch.arange(rows, device="cpu")


def _runs(rows: list[int], blocks: list[int], length: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts blocks where the row changes, they are not consecutive, or an extent begins: row, block,
    begin and end.
    """
    begin = 0
    for end in range(1, len(rows) + 1):
        if (
            end < len(rows)
            and rows[end] == rows[begin]
            and blocks[end] == blocks[end - 1] + 1
            and blocks[end] % length
        ):
            continue
        yield rows[begin], blocks[begin], begin, end
        begin = end
