"""Device-side block cache: a sliding window plus an LRU cache, in front of host memory or disk.

Tiers ``host`` and ``disk``. Every finished block lies in the offload store (``offload.py``). On the
device are block 0, the blocks that a call writes and reads as local (the window), and older blocks
that were read lately (the LRU cache). ``block_table.py`` says which block is where.
"""

from __future__ import annotations

import torch
from torch import Tensor

from landmark.memory.archive.layer import ArchivedLayer
from landmark.memory.geometry import CallGeometry
from landmark.memory.storage.block_range import BlockRange
from landmark.memory.storage.block_table import MANY, BlockTable, Misses, rank_in_group
from landmark.memory.storage.offload import OffloadStore
from landmark.memory.storage.pool import PageInArguments, Resident, ResidentBlocks
from landmark.memory.storage.tiers import OffloadConfig, TransferStats

LRU_BLOCKS = 128  # of each row and key/value head, where no budget is given
MOST_LRU_BLOCKS = 512  # of each row and key/value head, whatever the budget; a power of two
SPARE_WINDOW = 4  # a window more than this many times as long as a call needs shrinks


class CachedPool:
    """A ``BlockPool`` that keeps some blocks on the device and all finished ones below it.

    Args:
        block_size: positions of a block.
        local_blocks: finished blocks before a query's own that it always sees.
        config: budgets of this layer.
        kept: which blocks are kept.
    """

    needs_fetch = True

    def __init__(
        self, block_size: int, local_blocks: int, config: OffloadConfig, kept: BlockRange
    ) -> None:
        self.block_size = block_size
        self.local_blocks = local_blocks
        self.config = config
        self.kept = kept
        self._stats = TransferStats()
        self.offload = OffloadStore(config, self._stats)
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self.table = BlockTable(0, 1, 0, torch.device("cpu"))
        # Of the call that began last; a call with the same own blocks finds its window as it is.
        self._own_spans: list[tuple[int, int]] | None = None

    @property
    def stats(self) -> TransferStats:
        """See ``BlockPool.stats``."""
        hits, misses, copied = self.table.take_stats()
        if hits or misses or copied:
            self._stats.count("hits", hits)
            self._stats.count("misses", misses)
            self._stats.count("fetched_host", copied * 2 * self.keys[0, 0, 0].nbytes)
        return self._stats

    @property
    def window_size(self) -> int:
        """See ``BlockPool.window_size``."""
        return self.table.window_size

    def reserve(self, capacity: int, like: Tensor) -> None:
        """See ``BlockPool.reserve``; the budget decides how much room there is.

        Raises:
            ValueError: the budget does not hold one block.
        """
        if self.keys.numel():
            return
        batch, heads, _, dim = like.shape
        lru_size = self._affordable(batch, heads * self.block_size * dim * like.itemsize)
        self.keys = like.new_zeros(batch, heads, 1 + lru_size, self.block_size, dim)
        self.values = torch.zeros_like(self.keys)
        self.table = BlockTable(batch, heads, lru_size, like.device)

    def begin_call(self, geometry: CallGeometry) -> None:
        """See ``BlockPool.begin_call``.

        The window shrinks when a call needs at most a quarter of it.
        """
        # Calls inside one and the same block: its physical block is there, and a crop that leaves
        # the row in this block has finished no other.
        if geometry.own_spans == self._own_spans:
            return
        first, last = torch.tensor(geometry.own_spans).T
        self.table.forget_after(first)
        own_blocks = int((last - first).max()) + 1
        needed = own_blocks + self.local_blocks
        if not needed <= self.table.window_size <= SPARE_WINDOW * needed:
            self._resize_window(needed, first)
        self._reload_unfinished(first, geometry)
        own = torch.minimum(first[:, None] + torch.arange(own_blocks), last[:, None])
        self.table.place_in_window(own)
        self._own_spans = geometry.own_spans

    def append(
        self, key: Tensor, value: Tensor, geometry: CallGeometry, *, begun: bool = False
    ) -> None:
        """See ``BlockPool.append``."""
        if not begun:
            self.begin_call(geometry)
        writes = geometry.writes
        index = self._window_index(writes.blocks)
        self.keys[writes.rows, :, index, writes.offsets] = key[writes.rows, :, writes.columns]
        self.values[writes.rows, :, index, writes.offsets] = value[writes.rows, :, writes.columns]
        if geometry.finished_blocks:
            self.seal_blocks(geometry)

    def seal_blocks(self, geometry: CallGeometry) -> None:
        """Copies the blocks that a call finished to the offload store."""
        rows = geometry.writes.landmark_rows
        index = self._window_index(geometry.writes.landmark_blocks)
        data = torch.stack((self.keys[rows, :, index], self.values[rows, :, index]), dim=2)
        # Rows and blocks are known on the CPU, so that the device is not asked for them.
        finished_rows, finished_blocks = torch.tensor(geometry.finished_blocks).T
        self.offload.write(finished_rows, finished_blocks, data, len(self.keys))

    def make_resident(self, shared: Tensor, selected: Tensor | None) -> Resident:
        """See ``BlockPool.make_resident``.

        Shared blocks that are not in the window are gathered into memory of this call alone.
        """
        found = self.table.translate(shared, selected)
        if found.misses is not None:
            self._page_in(found.misses)
        if found.shared is not None:
            common = ResidentBlocks(self.keys, self.values, found.shared)
        else:
            common = self._gather_shared(shared)
        if found.selected is None:
            return Resident(common, None)
        return Resident(common, ResidentBlocks(self.keys, self.values, found.selected))

    def gather_blocks(self, blocks: Tensor) -> ResidentBlocks:
        """Copies blocks ``(B, G, ...)`` to memory of this call alone."""
        batch, heads = self.keys.shape[:2]
        row_head, block, inverse = self.table.distinct(blocks)
        keys, values = self.gather(row_head, block)
        # The distinct blocks of each row head are counted from 0.
        index = rank_in_group(row_head)
        shape = (batch * heads, int(index.max()) + 1, *keys.shape[1:])
        gathered_keys = keys.new_empty(shape)
        gathered_values = keys.new_empty(shape)
        gathered_keys[row_head, index] = keys
        gathered_values[row_head, index] = values
        return ResidentBlocks(
            torch.unflatten(gathered_keys, 0, (batch, heads)),
            torch.unflatten(gathered_values, 0, (batch, heads)),
            index[inverse],
        )

    def gather(self, row_head: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockPool.gather``."""
        distinct, inverse = torch.unique(row_head * MANY + block, return_inverse=True)
        row_head = distinct // MANY
        block = distinct % MANY
        physical = self.table.lookup(row_head, block)
        is_here = physical >= 0
        keys = self.keys.new_empty(len(block), *self.keys.shape[3:])
        values = torch.empty_like(keys)
        keys[is_here] = self.keys.flatten(0, 1)[row_head[is_here], physical[is_here]]
        values[is_here] = self.values.flatten(0, 1)[row_head[is_here], physical[is_here]]
        is_below = ~is_here
        if bool(is_below.any()):
            data = self._read(row_head[is_below], block[is_below])
            keys[is_below] = data[:, 0]
            values[is_below] = data[:, 1]
        return keys[inverse], values[inverse]

    def resume(self, saved: ArchivedLayer, partial: Tensor) -> None:
        """See ``BlockPool.resume``; of the finished blocks, reads block 0 alone."""
        self.offload.resume(saved, self.kept.first)
        own = torch.tensor([saved.count])
        self._resize_window(1 + self.local_blocks, own)
        self.table.place_in_window(own[:, None])
        parts = [(self._window_index(own), partial[None])]
        if saved.count:
            block_0 = torch.tensor([0])
            parts.append((block_0, saved.of_all_heads(block_0)))
        for index, data in parts:
            here = data.to(self.keys.device)
            self.keys[:, :, index] = here[:, :, 0][:, :, None]
            self.values[:, :, index] = here[:, :, 1][:, :, None]

    def evict(self, drop: int) -> None:
        """See ``BlockPool.evict``."""
        self.offload.drop(self.kept.first + drop)

    def select_rows(self, rows: Tensor) -> None:
        """See ``BlockPool.select_rows``; under a budget, more rows get a smaller LRU cache each."""
        block_bytes = self.keys[0, :, 0].nbytes
        lru_size = min(self.table.lru_size, self._affordable(len(rows), block_bytes))
        used = slice(1 + self.table.window_size + lru_size)
        self.keys = self.keys[:, :, used].index_select(0, rows)
        self.values = self.values[:, :, used].index_select(0, rows)
        self.table.select_rows(rows, lru_size)
        self._own_spans = None
        self.offload.select_rows(rows.cpu())

    def back_by_archive(self, saved: ArchivedLayer) -> None:
        """See ``BlockPool.back_by_archive``."""
        self.offload.back_by_archive(saved)

    def graph_key(self) -> tuple[int, ...] | None:
        """See ``BlockPool.graph_key``; kernels fetch blocks that all lie in host memory."""
        pointers = self.offload.device_pointers(self.keys.device)
        if pointers is None:
            return None
        table = self.table
        tensors = (
            self.keys,
            self.values,
            table.window,
            table.lru,
            table.last_used,
            table.stats,
            pointers,
        )
        addresses = (each.data_ptr() for each in tensors)
        return self.kept.first, self.keys.shape[2], self.offload.extent_blocks, *addresses

    def page_in_arguments(self) -> PageInArguments | None:
        """See ``BlockPool.page_in_arguments``; some blocks on disk are what kernels cannot read."""
        pointers = self.offload.device_pointers(self.keys.device)
        if pointers is None:
            return None
        return PageInArguments(
            window=self.table.window,
            lru=self.table.lru,
            last_used=self.table.last_used,
            stats=self.table.stats,
            lru_size=self.table.lru_size,
            pointers=pointers,
            extent_blocks=self.offload.extent_blocks,
        )

    def nbytes(self, tier: str) -> int:
        """See ``BlockPool.nbytes``."""
        if tier == "device":
            return self.keys.nbytes + self.values.nbytes
        return self.offload.nbytes(tier)

    def check_integrity(self) -> None:
        """See ``BlockPool.check_integrity``; also that cached blocks are those of the store."""
        self.table.check_integrity()
        self.offload.check_integrity()
        size = 1 + self.table.window_size + self.table.lru_size
        assert not self.keys.numel() or self.keys.shape[2] == size, "room and block table differ"
        lru = self.table.lru
        is_kept = (lru == 0) | (lru >= self.kept.first)
        row_head, slot = is_kept.nonzero(as_tuple=True)
        if len(row_head) == 0:
            return
        physical = 1 + self.table.window_size + slot
        heads = self.keys.shape[1]
        rows = row_head.cpu() // heads
        below = self.offload.peek(rows, lru[row_head, slot].cpu(), row_head.cpu() % heads)
        below = below.to(self.keys.device)
        assert torch.equal(self.keys.flatten(0, 1)[row_head, physical], below[:, 0]), "keys"
        assert torch.equal(self.values.flatten(0, 1)[row_head, physical], below[:, 1]), "values"

    def _affordable(self, batch: int, key_bytes: int) -> int:
        """Returns the size of the LRU cache of each row head.

        Args:
            batch: rows.
            key_bytes: bytes of the keys of one block of a row, all heads together.
        """
        one = 2 * batch * key_bytes
        budget = self.config.device_bytes
        if budget is None:
            return LRU_BLOCKS
        if budget < one:
            raise ValueError(
                f"device_bytes: expected at least {one} bytes in each layer, one block of all rows "
                f"and heads, got {budget}: give more"
            )
        return min(budget // one, MOST_LRU_BLOCKS)

    def _window_index(self, blocks: Tensor) -> Tensor:
        return torch.where(blocks == 0, 0, 1 + blocks % self.table.window.shape[1])

    def _resize_window(self, size: int, own: Tensor) -> None:
        """Changes the size of the window; ``own (B,)`` is the latest block of each row."""
        before = 1 + self.table.window_size
        rows, old_index, new_index = self.table.resize_window(size, own)
        self.keys = _resized(self.keys, before, 1 + size, rows, old_index, new_index)
        self.values = _resized(self.values, before, 1 + size, rows, old_index, new_index)

    def _reload_unfinished(self, first: Tensor, geometry: CallGeometry) -> None:
        """Brings back first own blocks that were finished before a crop and are written again."""
        rows = torch.arange(len(first))
        begun = (torch.tensor(geometry.filled_before) > 0) & (first > 0)
        absent = self.table.window_host[rows, first % self.table.window_size] != first
        rows = rows[begun & absent]
        if len(rows) == 0:
            return
        heads = self.keys.shape[1]
        row_head = (rows[:, None] * heads + torch.arange(heads)).flatten()
        data = self._read(row_head, first[rows].repeat_interleave(heads))
        data = torch.unflatten(data, 0, (len(rows), heads))
        index = self._window_index(first[rows])
        self.keys[rows, :, index] = data[:, :, 0]
        self.values[rows, :, index] = data[:, :, 1]
        self._stats.count("misses", len(row_head))

    def _page_in(self, misses: Misses) -> None:
        """Copies blocks from below to the physical blocks that they were given."""
        try:
            data = self._read(misses.row_head, misses.block)
        except BaseException:
            self.table.remove(misses)
            raise
        self.keys.flatten(0, 1)[misses.row_head, misses.physical] = data[:, 0]
        self.values.flatten(0, 1)[misses.row_head, misses.physical] = data[:, 1]

    def _gather_shared(self, blocks: Tensor) -> ResidentBlocks:
        """Gathers blocks ``(B, ...)``, at the same index for all heads."""
        heads = self.keys.shape[1]
        gathered = self.gather_blocks(blocks[:, None].expand(-1, heads, *blocks.shape[1:]))
        return ResidentBlocks(gathered.keys, gathered.values, gathered.index[:, 0])

    def _read(self, row_head: Tensor, block: Tensor) -> Tensor:
        """Reads keys and values ``(M, 2, L, D)`` of blocks from the offload store."""
        heads = self.keys.shape[1]
        row_head = row_head.cpu()
        found = self.offload.read(row_head // heads, block.cpu(), row_head % heads)
        return found.to(self.keys.device)


def _resized(
    pool: Tensor, before: int, after: int, rows: Tensor, old_index: Tensor, new_index: Tensor
) -> Tensor:
    """Returns a pool ``(B, G, P, L, D)`` whose first ``after`` physical blocks were ``before``.

    Block 0 stays, the LRU cache behind the window stays, and blocks of the window move from
    ``old_index`` to ``new_index`` in their ``rows``, ``(M,)`` each.
    """
    batch, heads, count, size, dim = pool.shape
    made = pool.new_zeros(batch, heads, count + after - before, size, dim)
    made[:, :, 0] = pool[:, :, 0]
    made[:, :, after:] = pool[:, :, before:]
    made[rows, :, new_index] = pool[rows, :, old_index]
    return made
