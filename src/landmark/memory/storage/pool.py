"""Interface of a KV block pool, and the pool that keeps every block on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from landmark.memory.archive.layer import AT_ONCE, ArchivedLayer
from landmark.memory.geometry import CallGeometry
from landmark.memory.storage.block_range import BlockRange
from landmark.memory.storage.tiers import TransferStats


@dataclass(frozen=True)
class ResidentBlocks:
    """Blocks that can be read on the device until the next call of their memory.

    Attributes:
        keys: ``(B, G, P, L, D)`` keys of ``P`` physical blocks.
        values: the same of values.
        index: the physical block of each block that was asked for, in the shape it was asked in.
    """

    keys: Tensor
    values: Tensor
    index: Tensor


@dataclass(frozen=True)
class Resident:
    """What ``BlockPool.make_resident`` brought to the device.

    Attributes:
        shared: blocks that all heads of a row read.
        selected: blocks that each head selected; ``None`` where there are none, or where they do
            not fit on the device together and have to be gathered.
    """

    shared: ResidentBlocks
    selected: ResidentBlocks | None


@dataclass(frozen=True)
class PageInArguments:
    """The block table of a pool, and where its blocks lie in host memory.

    Attributes:
        window: see ``BlockTable``.
        lru: likewise.
        last_used: likewise.
        stats: likewise.
        lru_size: likewise.
        pointers: see ``OffloadStore.device_pointers``.
        extent_blocks: blocks of an extent of the offload store.
    """

    window: Tensor
    lru: Tensor
    last_used: Tensor
    stats: Tensor
    lru_size: int
    pointers: Tensor
    extent_blocks: int


class BlockPool(Protocol):
    """Keys and values of a layer's blocks, in physical blocks on the device.

    Blocks are named by number, as everywhere. A block below 0 stands for no block; what is read in
    its place is of no meaning.

    Attributes:
        keys: ``(B, G, P, L, D)`` on the model's device.
        values: the same.
        needs_fetch: whether blocks may have to be copied to the device before they are read.
        block_size: positions of a block, ``L``.
    """

    block_size: int
    keys: Tensor
    values: Tensor
    needs_fetch: bool

    @property
    def stats(self) -> TransferStats:
        """What moved between tiers."""

    @property
    def window_size(self) -> int:
        """Physical blocks of the window; 0 where every block has its own physical block."""

    def reserve(self, capacity: int, like: Tensor) -> None:
        """Makes room for ``capacity`` blocks of keys like ``like (B, G, *, D)``."""

    def begin_call(self, geometry: CallGeometry) -> None:
        """Gives the blocks that a call writes their physical blocks; room was reserved."""

    def append(
        self, key: Tensor, value: Tensor, geometry: CallGeometry, *, begun: bool = False
    ) -> None:
        """Writes the slots of a call, and seals the blocks that they finish.

        Args:
            key: ``(B, G, T, D)``, rotated by its offset inside the block.
            value: ``(B, G, T, D)``.
            geometry: the call, on the device of the keys.
            begun: whether ``begin_call`` was called; otherwise this does it.
        """

    def seal_blocks(self, geometry: CallGeometry) -> None:
        """Stores the blocks that a call finished; their slots were written."""

    def make_resident(self, shared: Tensor, selected: Tensor | None) -> Resident:
        """Brings blocks to the device.

        Args:
            shared: ``(B, ...)`` blocks that all heads of a row read.
            selected: ``(B, G, ...)`` blocks that each key/value head reads.
        """

    def gather_blocks(self, blocks: Tensor) -> ResidentBlocks:
        """Gathers blocks ``(B, G, ...)`` that do not fit the pool together."""

    def gather(self, row_head: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Copies blocks, on whatever tier they lie: keys and values ``(M, L, D)`` each.

        Args:
            row_head: ``(M,)`` numbers ``row * G + head`` of a row and key/value head.
            block: ``(M,)``.
        """

    def resume(self, saved: ArchivedLayer, partial: Tensor) -> None:
        """Goes on from an archive, in one row; room was reserved.

        Args:
            saved: the finished blocks.
            partial: ``(G, 2, L, D)`` keys and values of the block behind them, which is not
                finished, on the model's device.
        """

    def evict(self, drop: int) -> None:
        """Drops the ``drop`` blocks from the range's first on; the range is moved after this."""

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered."""

    def back_by_archive(self, saved: ArchivedLayer) -> None:
        """Lets an archive that holds these blocks stand in for files of the pool's own."""

    def graph_key(self) -> tuple[int, ...] | None:
        """Returns what a captured CUDA graph depends on; ``None`` where a call asks the host."""

    def page_in_arguments(self) -> PageInArguments | None:
        """Returns what the page-in kernels are given; ``None`` where they cannot be used."""

    def nbytes(self, tier: str) -> int:
        """Returns the bytes of keys and values held in a tier."""

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` where the pool's own bookkeeping contradicts itself."""


class DevicePool:
    """Tier ``device``: every block that is kept is on the device, and nothing moves.

    Args:
        block_size: positions of a block.
        kept: which blocks are kept; a physical block is an index of this range.
    """

    needs_fetch = False

    def __init__(self, block_size: int, kept: BlockRange) -> None:
        self.block_size = block_size
        self.kept = kept
        self.keys = torch.empty(0)
        self.values = torch.empty(0)

    @property
    def stats(self) -> TransferStats:
        """Returns zeros: nothing moves."""
        return TransferStats()

    @property
    def window_size(self) -> int:
        """Returns 0: there is no window."""
        return 0

    def reserve(self, capacity: int, like: Tensor) -> None:
        """See ``BlockPool.reserve``."""
        shape = (*like.shape[:2], capacity, self.block_size, like.shape[-1])
        self.keys = grown(self.keys, like.new_zeros(shape))
        self.values = grown(self.values, like.new_zeros(shape))

    def begin_call(self, geometry: CallGeometry) -> None:
        """Does nothing: every block has its physical block."""

    def append(
        self, key: Tensor, value: Tensor, geometry: CallGeometry, *, begun: bool = False
    ) -> None:
        """See ``BlockPool.append``."""
        writes = geometry.writes
        index = self.kept.index_of(writes.blocks)
        self.keys[writes.rows, :, index, writes.offsets] = key[writes.rows, :, writes.columns]
        self.values[writes.rows, :, index, writes.offsets] = value[writes.rows, :, writes.columns]

    def seal_blocks(self, geometry: CallGeometry) -> None:
        """Does nothing: a finished block stays where it was written."""

    def make_resident(self, shared: Tensor, selected: Tensor | None) -> Resident:
        """See ``BlockPool.make_resident``."""
        common = ResidentBlocks(self.keys, self.values, self.kept.index_of(shared))
        if selected is None:
            return Resident(common, None)
        own = ResidentBlocks(self.keys, self.values, self.kept.index_of(selected))
        return Resident(common, own)

    def gather_blocks(self, blocks: Tensor) -> ResidentBlocks:
        """Returns the blocks where they are."""
        return ResidentBlocks(self.keys, self.values, self.kept.index_of(blocks))

    def gather(self, row_head: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockPool.gather``."""
        index = self.kept.index_of(block)
        return self.keys.flatten(0, 1)[row_head, index], self.values.flatten(0, 1)[row_head, index]

    def resume(self, saved: ArchivedLayer, partial: Tensor) -> None:
        """See ``BlockPool.resume``; reads all blocks."""
        blocks = [0, *range(max(self.kept.first, 1), saved.count)] if saved.count else []
        for begin in range(0, len(blocks), AT_ONCE):
            some = torch.tensor(blocks[begin : begin + AT_ONCE])
            data = saved.of_all_heads(some).to(self.keys.device)
            index = slice(begin, begin + len(some))
            self.keys[0, :, index] = data[:, :, 0].transpose(0, 1)
            self.values[0, :, index] = data[:, :, 1].transpose(0, 1)
        self.keys[0, :, len(blocks)] = partial[:, 0]
        self.values[0, :, len(blocks)] = partial[:, 1]

    def evict(self, drop: int) -> None:
        """See ``BlockPool.evict``."""
        drop_from_1(self.keys, drop)
        drop_from_1(self.values, drop)

    def select_rows(self, rows: Tensor) -> None:
        """See ``BlockPool.select_rows``."""
        self.keys = self.keys.index_select(0, rows)
        self.values = self.values.index_select(0, rows)

    def back_by_archive(self, saved: ArchivedLayer) -> None:
        """Does nothing: there are no files."""

    def graph_key(self) -> tuple[int, ...] | None:
        """See ``BlockPool.graph_key``."""
        return self.keys.data_ptr(), self.values.data_ptr()

    def page_in_arguments(self) -> PageInArguments | None:
        """Returns ``None``: nothing is paged in."""
        return None

    def nbytes(self, tier: str) -> int:
        """See ``BlockPool.nbytes``."""
        return self.keys.nbytes + self.values.nbytes if tier == "device" else 0

    def check_integrity(self) -> None:
        """See ``BlockPool.check_integrity``."""
        assert self.keys.shape == self.values.shape, "keys and values differ in shape"
        assert self.kept.first >= 1, f"the first kept block is {self.kept.first}"


def grown(old: Tensor, new: Tensor) -> Tensor:
    """Returns ``new (B, G, more, ...)`` that begins with ``old``."""
    if old.numel():
        new[:, :, : old.shape[2]] = old
    return new


def drop_from_1(tensor: Tensor, drop: int) -> None:
    """Drops the indices ``1..drop`` of ``(B, G, indices, ...)``; those behind move down."""
    rest = tensor[:, :, 1 + drop :].clone()
    tensor[:, :, 1 : 1 + rest.shape[2]] = rest
