"""What lies below the device: the finished blocks of one layer, by block number."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from landmark.memory.extents import BlockFile, DiskExtent, Extent, HostExtent, SavedExtent, Written
from landmark.memory.saved import SavedLayer
from landmark.memory.tiers import Tiers, Traffic

EXTENT_BYTES = 2**22  # of an extent, at most, unless one block of all rows is larger


class Shelf:
    """Finished blocks in extents of equal length; block ``b`` lies in extent ``b // length``.

    A fork shares extents with its origin, and rows that were repeated share what they have in common: an extent that
    somebody else may read is copied before it is written.

    Args:
        tiers: budgets of this layer.
        traffic: where moved bytes are counted.
    """

    def __init__(self, tiers: Tiers, traffic: Traffic) -> None:
        self.tiers, self.traffic = tiers, traffic
        self.length = 0  # blocks of an extent
        self.extents: list[Extent | None] = []
        self.rows: list[Tensor] = []  # of each extent (B,): where in it each row of the batch lies
        self.own: list[bool] = []  # of each extent: nobody else reads it
        self.file: BlockFile | None = None
        self._bytes: Counter[str] = Counter()  # of the extents, by tier
        self._addresses: Tensor | None = None  # as `addresses` gives them
        self._moved: set[int] = set()  # extents, since then
        self._arriving: torch.cuda.Event | None = None  # when what was written will be there

    def __deepcopy__(self, memo: dict[int, Any]) -> Shelf:
        """A fork: both share what there is and write no more into it."""
        self.own = [False] * len(self.own)
        fork = Shelf(self.tiers, copy.deepcopy(self.traffic, memo))
        memo[id(self)] = fork
        self._arrive()
        fork.length, fork.extents, fork.rows, fork.own = self.length, self.extents[:], self.rows[:], self.own[:]
        fork._bytes, fork._moved = self._bytes.copy(), self._moved.copy()
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
            extent, part = self._writable(block // self.length, shape, data.dtype), data[begin:end]
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
        """Returns keys and values ``(M, 2, L, D)`` of the blocks ``(M,)`` of given rows and key/value heads."""
        self._arrive()
        found: Tensor | None = None
        for index in torch.unique(blocks // self.length).tolist():
            here = (blocks // self.length == index).nonzero()[:, 0]
            extent = self._readable(index)
            part = extent.read(blocks[here] % self.length, self.rows[index][rows[here]], heads[here])
            if found is None:
                found = part.new_empty(len(blocks), *part.shape[1:], pin_memory=torch.cuda.is_available())
            found[here] = part
            self.traffic.count(f"fetched_{extent.tier}", part.numel() * part.itemsize)
        assert found is not None, "no blocks"
        return found

    def addresses(self, device: torch.device) -> Tensor | None:
        """Returns where blocks lie in the memory of the CPU, for a kernel to read, or ``None`` where some lie lower.

        Where an archive's blocks all find room there, they are brought first.

        Returns:
            ``(extents or more, B, 2)`` int64 on ``device``: of each extent and row the address of its first block, and
            the bytes from one to the next; at the same place until there are more extents than fit.
        """
        if self._moved:
            self._bring_all()
            room, count, moved = self._addresses, len(self.extents), sorted(self._moved)
            if not all(each is None or isinstance(each, HostExtent) for each in self.extents):
                room = None
            elif room is None or len(room) < count:
                moved = list(range(count))
                room = torch.zeros(2 * count, len(self.rows[0]), 2, dtype=torch.int64, device=device)
            if room is not None:
                found = torch.stack([self._address(index, device) for index in moved])
                room[torch.tensor(moved, device=device)] = found.to(device)
            self._addresses = room
            self._moved.clear()
        return self._addresses

    def _bring_all(self) -> None:
        """For tier ``host``, copies an archive's blocks to the memory of the CPU if the budget has room for all."""
        lower = sum(each.nbytes for each in self.extents if isinstance(each, SavedExtent))
        budget = self.tiers.host_bytes
        if lower and self.tiers.tier == "host" and (budget is None or self.nbytes("host") + lower <= budget):
            for index in range(len(self.extents)):
                if self.extents[index] is not None:
                    self._readable(index)

    def _address(self, index: int, device: torch.device) -> Tensor:
        """Of one extent, ``(B, 2)``; zeros where there is none."""
        extent, rows = self.extents[index], self.rows[index]
        if not isinstance(extent, HostExtent):
            return torch.zeros(len(rows), 2, dtype=torch.int64)
        begin, row_bytes, block_bytes = extent.address(device)
        return torch.stack((begin + rows * row_bytes, torch.full_like(rows, block_bytes)), dim=1)

    def adopt(self, saved: SavedLayer) -> None:
        """Lets an archive hold what it has of one row's blocks, but for those that are in the memory of the CPU."""
        if self.length == 0:
            self.length = max(1, EXTENT_BYTES // saved.block_bytes)
        count = saved.count
        for index in range(-(-count // self.length)):
            self._lengthen(index, 1)
            old, whole = self.extents[index], (index + 1) * self.length <= count
            if old is None or (whole and isinstance(old, DiskExtent)):
                self._put(index, SavedExtent(saved, index * self.length, self.length), in_order(1), own=False)

    def drop(self, first: int) -> None:
        """Lets go of blocks ``1..first - 1``, as far as they fill extents."""
        for index in range(1, min(len(self.extents), first // max(self.length, 1))):
            self._put(index, None, self.rows[index], own=False)

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered; nothing is moved."""
        self.rows = [each[rows] for each in self.rows]
        self.own = [False] * len(self.own)
        self._move_all()

    def nbytes(self, tier: str) -> int:
        """Bytes of the extents of one tier, those shared with a fork included."""
        return self._bytes[tier]

    def _readable(self, index: int) -> Extent:
        """An extent to read from; for tier ``host`` one of an archive is copied there, if the budget has room."""
        extent, budget = self.extents[index], self.tiers.host_bytes
        assert extent is not None, "a block that was dropped"
        if self.tiers.tier != "host" or not isinstance(extent, SavedExtent):
            return extent
        if budget is not None and self.nbytes("host") + extent.nbytes > budget:
            return extent
        data = extent.whole(self.rows[index])
        near = HostExtent(tuple(data.shape), data.dtype)
        self._fill(near, data)
        self._put(index, near, in_order(data.shape[1]), own=True)
        return near

    def _put(self, index: int, extent: Extent | None, rows: Tensor, *, own: bool) -> None:
        for each, sign in ((self.extents[index], -1), (extent, 1)):
            if each is not None:
                self._bytes[each.tier] += sign * each.nbytes
        self.extents[index], self.rows[index], self.own[index] = extent, rows, own
        self._moved.add(index)

    def _move_all(self) -> None:
        """Lets all addresses be asked for anew, for a batch of any size."""
        self._addresses, self._moved = None, set(range(len(self.extents)))

    def _lengthen(self, index: int, batch: int) -> None:
        while len(self.extents) <= index:
            self.extents.append(None)
            self.rows.append(in_order(batch))
            self.own.append(False)

    def _writable(self, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> Written:
        self._lengthen(index, shape[1])
        old = self.extents[index]
        if old is not None and self.own[index] and not isinstance(old, SavedExtent):
            return old
        self._arrive()
        new = self._allot(shape, dtype)
        old = self.extents[index]  # which may have moved down to make room
        if old is not None:
            self._fill(new, old.whole(self.rows[index]))
        self._put(index, new, in_order(shape[1]), own=True)
        return new

    def _allot(self, shape: tuple[int, ...], dtype: torch.dtype) -> Written:
        """Returns an empty extent in the highest tier whose budget has room for it, or can make room."""
        size, budget = torch.Size(shape).numel() * dtype.itemsize, self.tiers.host_bytes
        if self.tiers.tier == "disk" and (budget is None or budget < size):
            return DiskExtent(self._file(shape, dtype))
        while budget is not None and self.nbytes("host") + size > budget:
            if self.tiers.tier == "host":
                raise ValueError(
                    f"host_bytes: expected room for {self.nbytes('host') + size} bytes in each layer, got {budget}: "
                    "give more or use tier='disk'"
                )
            self._move_down()
        return HostExtent(shape, dtype)

    def _move_down(self) -> None:
        """Moves the oldest extent of the host to the disk."""
        index, old = next((i, each) for i, each in enumerate(self.extents) if isinstance(each, HostExtent))
        data = old.whole(self.rows[index])
        new = DiskExtent(self._file(tuple(data.shape), data.dtype))
        self._fill(new, data)
        self._put(index, new, in_order(data.shape[1]), own=True)

    def _fill(self, extent: Written, data: Tensor) -> None:
        extent.fill(data)
        self.traffic.count(f"written_{extent.tier}", data.numel() * data.itemsize)

    def _file(self, shape: tuple[int, ...], dtype: torch.dtype) -> BlockFile:
        if self.file is None or self.file.shape != shape:
            self.file = BlockFile(self.tiers.folder, shape, dtype)
        return self.file


@cache
def in_order(rows: int) -> Tensor:
    """Returns the rows of an extent that nobody has reordered: one tensor for all, never written to."""
    return torch.arange(rows, device="cpu")


def _runs(rows: list[int], blocks: list[int], length: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts blocks where the row changes, they are not consecutive, or an extent begins: row, block, begin and end."""
    begin = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end] == rows[begin] and blocks[end] == blocks[end - 1] + 1 and blocks[end] % length:
            continue
        yield rows[begin], blocks[begin], begin, end
        begin = end
