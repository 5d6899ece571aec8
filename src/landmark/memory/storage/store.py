"""One layer's blocks, addressed by (row, block): their landmark keys, and the tier that holds their
keys and values.

``write`` puts slots of any rows, ``landmarks`` gives every landmark key without touching the
blocks, ``fetch`` brings blocks near by place, on every tier the same. Kernels that file and bring
blocks (``triton/launch.py``) are given the tensors themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from landmark.memory.archive.layer import AT_ONCE, SavedLayer
from landmark.memory.geometry import CacheWrites, CallGeometry
from landmark.memory.storage.cached_pool import CachedPool
from landmark.memory.storage.pool import BlockPool, DevicePool, grown, shift
from landmark.memory.storage.tiers import OffloadConfig, TransferStats

EVICTION_STEP = 16  # blocks are dropped this many at a time
SPARE_BLOCKS = 8  # blocks kept beyond what is needed, so that a cache can be cropped a little


class BlockStore:
    """Blocks of one layer; keys hold their in-block position only.

    Place 0 is block 0. Place ``p > 0`` is block ``first + p - 1``; ``first`` grows when blocks are
    evicted, for all rows at once.

    Args:
        block_size: positions of a block, landmark included.
        local_blocks: finished blocks before a query's own that it always sees.
        shared_landmark: all landmark keys are one vector (a model's first layer): the one written
            first is kept for all, so that their scores tie exactly.
        tiers: where blocks live; budgets of this layer.
    """

    def __init__(
        self,
        block_size: int,
        *,
        local_blocks: int = 0,
        shared_landmark: bool = False,
        tiers: OffloadConfig | None = None,
    ) -> None:
        tiers = tiers or OffloadConfig()
        self.block_size = block_size
        self.shared_landmark = shared_landmark
        self.first = 1
        self.near: BlockPool = (
            DevicePool(block_size)
            if tiers.tier == "device"
            else CachedPool(block_size, local_blocks, tiers)
        )
        self.landmark_keys = torch.empty(0)

    @property
    def fetches(self) -> bool:
        """Whether blocks are copied to be read."""
        return isinstance(self.near, CachedPool)

    @property
    def traffic(self) -> TransferStats:
        """What moved between tiers."""
        return self.near.traffic

    @property
    def places(self) -> int:
        """Places allocated."""
        return self.landmark_keys.shape[2] if self.landmark_keys.ndim == 4 else 0

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of keys and values, ``None`` before the first call."""
        return self.landmark_keys.dtype if self.places else None

    def place_of(self, blocks: Tensor) -> Tensor:
        """Returns the places of ``blocks``: block 0 and all from ``first`` on have one; ask for no
        others.
        """
        return (blocks - self.first + 1).clamp_(min=0)

    def block_of(self, places: Tensor) -> Tensor:
        """Returns the blocks that stand at ``places``."""
        return torch.where(places == 0, 0, places + self.first - 1)

    def reserve(self, blocks: int, like: Tensor) -> None:
        """Makes room for blocks ``0..blocks - 1`` of keys like ``like (B, G, *, D)``."""
        needed = max(1, blocks - self.first + 1)
        if needed <= self.places:
            return
        batch, heads, _, dim = like.shape
        places = max(needed, self.places + self.places // 2, 4)
        self.near.reserve(places, like)
        self.landmark_keys = grown(self.landmark_keys, like.new_zeros(batch, heads, places, dim))

    def open(self, plan: CallGeometry) -> None:
        """Begins a call: the blocks that it writes and their unfinished parts are near until the
        next.
        """
        self.near.open(plan)

    def depends(self) -> tuple[int, ...] | None:
        """Returns what a captured call depends on; ``None`` where fetching asks the device
        something.
        """
        found = self.near.depends()
        return (
            None
            if found is None
            else (self.first, self.places, self.landmark_keys.data_ptr(), *found)
        )

    def write(self, key: Tensor, value: Tensor, writes: CacheWrites) -> None:
        """Files new slots.

        Args:
            key: ``(B, G, T, D)``, rotated by its position inside the block.
            value: ``(B, G, T, D)``.
            writes: which column goes to which slot of which row; the blocks must have been
                reserved.
        """
        self.near.write(key, value, writes, self.place_of(writes.blocks))
        rows = writes.landmark_rows
        columns = writes.landmark_columns
        if len(rows) == 0:
            return
        places = self.place_of(writes.landmark_blocks)
        shared = None
        self.landmark_keys[rows, :, places] = key[rows, :, columns]
        if self.shared_landmark:
            shared = self.landmark_keys[rows, :, 0]
            self.landmark_keys[rows, :, places] = shared
        self.finish(writes, shared)

    def finish(self, writes: CacheWrites, landmark: Tensor | None = None) -> None:
        """Told that slots were filed; ``landmark (M, G, D)`` replaces the last key of the blocks
        they finish.
        """
        if len(writes.landmark_rows):
            self.near.finish(writes.landmark_rows, self.place_of(writes.landmark_blocks), landmark)

    def landmarks(self, count: int) -> Tensor:
        """Returns the landmark keys at places ``0..count - 1``, ``(B, G, count, D)``."""
        return self.landmark_keys[:, :, :count]

    def fetch(self, *places: Tensor) -> tuple[Tensor, ...]:
        """Brings whole blocks near; as ``BlockPool.fetch``."""
        return self.near.fetch(*places)

    def gather(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Copies whole blocks: keys and values, ``(B, G, ..., L, D)`` each, of places ``(B, G or 1,
        ...)``.
        """
        return self.take(self.numbered(places))

    def numbered(self, places: Tensor) -> Tensor:
        """Returns one number for each row, head and place ``(B, G, ...)``, by which ``take`` knows
        blocks.

        The second dimension of ``places`` may be 1 for "the same for all heads".
        """
        batch, heads, count = self.landmark_keys.shape[:3]
        origin = (
            torch.arange(batch * heads, device=places.device).view(
                batch, heads, *[1] * (places.ndim - 2)
            )
            * count
        )
        return places + origin

    def take(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Copies whole blocks by their numbers, of any shape: keys and values, ``(..., L, D)``
        each.
        """
        flat = numbers.flatten()
        keys, values = self.near.take(flat // self.places, flat % self.places)
        return keys.view(*numbers.shape, *keys.shape[1:]), values.view(
            *numbers.shape, *values.shape[1:]
        )

    def evict(self, needed_from: int) -> None:
        """Drops blocks ``1..needed_from - 1`` but for a few spare ones, a whole step at a time;
        block 0 stays.
        """
        drop = needed_from - SPARE_BLOCKS - self.first
        if drop < EVICTION_STEP or self.places == 0:
            return
        shift(self.landmark_keys, drop)
        self.near.evict(drop)
        self.first += drop

    def resume(self, saved: SavedLayer, first: int, tail: Tensor) -> None:
        """Goes on from an archive, in one row.

        Args:
            saved: the finished blocks.
            first: the first of them that is kept, but for block 0.
            tail: ``(1, G, 2, L, D)`` keys and values of the block behind them, on the model's
                device.

        Raises:
            Damaged: what was saved is not what was written.
            ValueError: a budget is too small.
        """
        self.first = first
        self.reserve(saved.count + 1, tail[:, :, 0])
        marks = saved.landmarks()
        if saved.count:
            self.landmark_keys[:, :, 0] = marks[:, :, 0]
            self.landmark_keys[:, :, 1 : 1 + saved.count - first] = marks[:, :, first:]
        self.near.resume(saved, first, tail[0])

    def save(self, saved: SavedLayer, blocks: int) -> None:
        """Writes to an archive what it lacks of the one row's first ``blocks`` blocks, which are
        finished.

        Those that were evicted are left out: nobody sees them again.
        """
        while saved.count < blocks:
            begin = saved.count
            if 0 < begin < self.first:
                saved.skip(min(self.first, blocks) - begin)
            else:
                saved.append(*self._finished(begin, min(begin + AT_ONCE, blocks) if begin else 1))

    def _finished(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Returns blocks ``begin..end - 1`` of the one row, ``(n, G, 2, L, D)``, and their
        landmarks ``(n, G, D)``.
        """
        places = self.place_of(torch.arange(begin, end, device=self.landmark_keys.device))
        keys, values = self.gather(places[None, None])
        data = torch.stack((keys[0], values[0]), dim=2).transpose(0, 1)
        return data.cpu(), self.landmark_keys[0][:, places].transpose(0, 1).cpu()

    def adopt(self, saved: SavedLayer) -> None:
        """Told that an archive holds these blocks too: files of this memory's own need not."""
        if isinstance(self.near, CachedPool):
            self.near.shelf.adopt(saved)

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered."""
        if self.places:
            rows = rows.to(self.landmark_keys.device)
            self.near.select_rows(rows)
            self.landmark_keys = self.landmark_keys.index_select(0, rows)

    def nbytes(self, tier: str) -> int:
        """Bytes held in a tier; landmark keys count on the device."""
        marks = self.landmark_keys.numel() * self.landmark_keys.itemsize if tier == "device" else 0
        return marks + self.near.nbytes(tier)
