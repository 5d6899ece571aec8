"""Block store of one layer: its landmark keys, and the pool that holds its keys and values.

Blocks are addressed by (row, block). The landmark keys of all kept blocks are one dense tensor on
the device, so that they are scored without touching the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from landmark.memory.archive.layer import AT_ONCE, ArchivedLayer
from landmark.memory.geometry import CacheWrites, CallGeometry
from landmark.memory.storage.block_range import BlockRange
from landmark.memory.storage.cached_pool import CachedPool
from landmark.memory.storage.pool import BlockPool, DevicePool, drop_from_1, grown
from landmark.memory.storage.tiers import OffloadConfig, TransferStats

EVICTION_STEP = 16  # blocks are dropped this many at a time
SPARE_BLOCKS = 8  # blocks kept beyond what is needed, so that a cache can be cropped a little


@dataclass(frozen=True)
class LandmarkKeys:
    """Landmark keys of some blocks of each row, to be scored.

    Attributes:
        blocks: ``(B or 1, P)`` their blocks, ascending.
        keys: ``(B, G, P, D)``.
        equal: whether all are one vector (a model's first layer under stingy positions).
        end: a block number that no kept block reaches.
    """

    blocks: Tensor
    keys: Tensor
    equal: bool
    end: int


class BlockStore:
    """Blocks of one layer. Keys are rotated by their offset inside the block only.

    Args:
        block_size: positions of a block, landmark included.
        local_blocks: finished blocks before a query's own that it always sees.
        shared_landmark: all landmark keys are one vector (a model's first layer). The one written
            first is kept for all, so that their scores tie exactly.
        reads_older: whether queries of this layer read blocks older than the local ones; otherwise
            these are dropped.
        offload: where blocks live, ``None`` for the device; budgets of this layer.

    Attributes:
        kept: which blocks are kept, and at which index of ``landmark_keys``.
        pool: holds keys and values.
        landmark_keys: ``(B, G, capacity, D)``.
    """

    def __init__(
        self,
        block_size: int,
        *,
        local_blocks: int = 0,
        shared_landmark: bool = False,
        reads_older: bool = True,
        offload: OffloadConfig | None = None,
    ) -> None:
        self.block_size = block_size
        self.shared_landmark = shared_landmark
        self.reads_older = reads_older
        self.kept = BlockRange()
        self.pool: BlockPool
        if offload is None or offload.tier == "device":
            self.pool = DevicePool(block_size, self.kept)
        else:
            self.pool = CachedPool(block_size, local_blocks, offload, self.kept)
        self.landmark_keys = torch.empty(0)

    @property
    def first(self) -> int:
        """The first block that is kept, but for block 0."""
        return self.kept.first

    @property
    def stats(self) -> TransferStats:
        """What moved between tiers."""
        return self.pool.stats

    @property
    def capacity(self) -> int:
        """Blocks that there is room for, as far as landmark keys go."""
        return self.landmark_keys.shape[2] if self.landmark_keys.ndim == 4 else 0

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of keys and values, ``None`` before the first call."""
        return self.landmark_keys.dtype if self.capacity else None

    def begin_call(self, geometry: CallGeometry, like: Tensor) -> None:
        """Drops what no query will see any more, and makes room for a call.

        Args:
            geometry: the call.
            like: keys ``(B, G, *, D)`` of the call's dtype and device.
        """
        self._make_room(geometry, like)
        self.pool.begin_call(geometry)

    def append(
        self, key: Tensor, value: Tensor, geometry: CallGeometry, *, begun: bool = False
    ) -> None:
        """Writes the slots of a call, and seals the blocks that they finish.

        Args:
            key: ``(B, G, T, D)``, rotated by its offset inside the block.
            value: ``(B, G, T, D)``.
            geometry: the call, on the device of the keys.
            begun: whether ``begin_call`` was called.
        """
        if not begun:
            self._make_room(geometry, key)
        key = self._write_landmarks(key, geometry.writes)
        self.pool.append(key, value, geometry, begun=begun)

    def landmarks_before(self, block: int) -> LandmarkKeys:
        """Returns the landmark keys of the kept blocks before ``block``, at least of block 0."""
        blocks = self.kept.blocks_before(block, self.landmark_keys.device)
        return LandmarkKeys(
            blocks=blocks[None],
            keys=self.landmark_keys[:, :, : len(blocks)],
            equal=self.shared_landmark,
            end=self.kept.first + self.capacity,
        )

    def landmarks_from(self, first: Tensor, count: int) -> LandmarkKeys:
        """Returns the landmark keys of ``count`` blocks from ``first (B,)`` on.

        Of blocks that were dropped the keys have no meaning.
        """
        blocks = first[:, None] + torch.arange(count, device=first.device)
        index = self.kept.index_of(blocks).clamp(max=self.capacity - 1)
        rows = torch.arange(len(first), device=first.device)[:, None]
        return LandmarkKeys(
            blocks=blocks,
            keys=self.landmark_keys[rows, :, index].transpose(1, 2),
            equal=self.shared_landmark,
            end=self.kept.first + self.capacity,
        )

    def graph_key(self) -> tuple[int, ...] | None:
        """Returns what a captured CUDA graph depends on; ``None`` where a call asks the host."""
        found = self.pool.graph_key()
        if found is None:
            return None
        return self.first, self.capacity, self.landmark_keys.data_ptr(), *found

    def partial_block(self, block: int, slots: int) -> Tensor:
        """Returns the one row's block that is not finished, ``(G, 2, L, D)``, zeros behind it.

        Args:
            block: its number.
            slots: slots that it has.
        """
        _, groups, _, dim = self.landmark_keys.shape
        partial = self.landmark_keys.new_zeros(groups, 2, self.block_size, dim)
        if slots:
            keys, values = self._copy(torch.tensor([block]))
            partial[:, 0, :slots] = keys[:, 0, :slots]
            partial[:, 1, :slots] = values[:, 0, :slots]
        return partial

    def resume(self, saved: ArchivedLayer, first: int, partial: Tensor) -> None:
        """Goes on from an archive, in one row.

        Args:
            saved: the finished blocks.
            first: the first of them that is kept, but for block 0.
            partial: ``(G, 2, L, D)`` keys and values of the block behind them, on the model's
                device.

        Raises:
            Damaged: what was saved is not what was written.
            ValueError: a budget is too small.
        """
        self.kept.first = first
        self._reserve(saved.count + 1, partial[None, :, 0])
        keys = saved.landmarks()
        if saved.count:
            self.landmark_keys[:, :, 0] = keys[:, :, 0]
            self.landmark_keys[:, :, 1 : 1 + saved.count - first] = keys[:, :, first:]
        self.pool.resume(saved, partial)

    def save(self, saved: ArchivedLayer, blocks: int) -> None:
        """Appends to an archive what it lacks of the one row's first ``blocks`` blocks.

        These are finished. Those that were dropped are left out: nobody sees them again.
        """
        while saved.count < blocks:
            begin = saved.count
            if 0 < begin < self.first:
                saved.skip(min(self.first, blocks) - begin)
                continue
            end = min(begin + AT_ONCE, blocks) if begin else 1
            some = torch.arange(begin, end, device=self.landmark_keys.device)
            keys, values = self._copy(some)
            data = torch.stack((keys, values), dim=2).transpose(0, 1)
            landmarks = self.landmark_keys[0][:, self.kept.index_of(some)].transpose(0, 1)
            saved.append(data.cpu(), landmarks.cpu())

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered."""
        if self.capacity:
            rows = rows.to(self.landmark_keys.device)
            self.pool.select_rows(rows)
            self.landmark_keys = self.landmark_keys.index_select(0, rows)

    def nbytes(self, tier: str) -> int:
        """Returns the bytes held in a tier; landmark keys count on the device."""
        landmarks = self.landmark_keys.nbytes if tier == "device" else 0
        return landmarks + self.pool.nbytes(tier)

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` where the bookkeeping contradicts itself."""
        assert self.first >= 1, f"the first kept block is {self.first}"
        if self.capacity:
            self.pool.check_integrity()

    def _make_room(self, geometry: CallGeometry, like: Tensor) -> None:
        self._evict(geometry.needed_from if self.reads_older else geometry.local_from)
        self._reserve(geometry.blocks, like)

    def _evict(self, needed_from: int) -> None:
        """Drops the blocks ``1..needed_from - 1``, but for a few spare ones, step by step."""
        drop = needed_from - SPARE_BLOCKS - self.first
        if drop < EVICTION_STEP or self.capacity == 0:
            return
        drop_from_1(self.landmark_keys, drop)
        self.pool.evict(drop)
        self.kept.first += drop

    def _reserve(self, blocks: int, like: Tensor) -> None:
        """Makes room for the blocks ``0..blocks - 1`` of keys like ``like (B, G, *, D)``."""
        needed = max(1, blocks - self.first + 1)
        if needed <= self.capacity:
            return
        batch, heads, _, dim = like.shape
        capacity = max(needed, self.capacity + self.capacity // 2, 4)
        self.pool.reserve(capacity, like)
        self.landmark_keys = grown(self.landmark_keys, like.new_zeros(batch, heads, capacity, dim))

    def _write_landmarks(self, key: Tensor, writes: CacheWrites) -> Tensor:
        """Writes the landmark keys of a call; returns its keys as the pool is to hold them."""
        rows = writes.landmark_rows
        if len(rows) == 0:
            return key
        columns = writes.landmark_columns
        index = self.kept.index_of(writes.landmark_blocks)
        self.landmark_keys[rows, :, index] = key[rows, :, columns]
        if not self.shared_landmark:
            return key
        shared = self.landmark_keys[rows, :, 0]
        self.landmark_keys[rows, :, index] = shared
        key = key.clone()
        key[rows, :, columns] = shared
        return key

    def _copy(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values ``(G, M, L, D)`` of blocks ``(M,)`` of the one row."""
        heads = self.landmark_keys.shape[1]
        blocks = blocks.to(self.landmark_keys.device)
        row_head = torch.arange(heads, device=blocks.device).repeat_interleave(len(blocks))
        keys, values = self.pool.gather(row_head, blocks.repeat(heads))
        shape = (heads, len(blocks))
        return torch.unflatten(keys, 0, shape), torch.unflatten(values, 0, shape)
