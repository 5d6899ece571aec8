"""Where one layer's blocks live: keys and values addressed by (row, block), on the model's device.

The contract that other tiers will have to keep: ``write`` puts slots of any rows, ``landmarks`` gives every landmark
key without touching the blocks, ``gather`` fetches blocks by place. Nothing else reads the tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from landmark.memory.plan import Writes

EVICTION_STEP = 16  # blocks are dropped this many at a time
SPARE_BLOCKS = 8  # blocks kept beyond what is needed, so that a cache can be cropped a little


class BlockStore:
    """Keys and values of the blocks of one layer, ``(B, G, places, L, D)``; keys hold their in-block position only.

    Place 0 is block 0. Place ``p > 0`` is block ``first + p - 1``; ``first`` grows when blocks are evicted, for all
    rows at once.

    Args:
        block_size: positions of a block, landmark included.
        shared_landmark: all landmark keys are one vector (a model's first layer): the one written first is kept for
            all, so that their scores tie exactly.
    """

    def __init__(self, block_size: int, *, shared_landmark: bool = False) -> None:
        self.block_size = block_size
        self.shared_landmark = shared_landmark
        self.first = 1
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self.landmark_keys = torch.empty(0)

    @property
    def places(self) -> int:
        """Places allocated."""
        return self.landmark_keys.shape[2] if self.landmark_keys.ndim == 4 else 0

    def place_of(self, blocks: Tensor) -> Tensor:
        """Returns the places of ``blocks``: block 0 and all from ``first`` on have one; ask for no others."""
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
        grown = max(needed, self.places + self.places // 2, 4)
        self.keys = _grow(self.keys, like.new_zeros(batch, heads, grown, self.block_size, dim))
        self.values = _grow(self.values, like.new_zeros(batch, heads, grown, self.block_size, dim))
        self.landmark_keys = _grow(self.landmark_keys, like.new_zeros(batch, heads, grown, dim))

    def write(self, key: Tensor, value: Tensor, writes: Writes) -> None:
        """Files new slots.

        Args:
            key: ``(B, G, T, D)``, rotated by its position inside the block.
            value: ``(B, G, T, D)``.
            writes: which column goes to which slot of which row; the blocks must have been reserved.
        """
        places = self.place_of(writes.blocks)
        self.keys[writes.rows, :, places, writes.offsets] = key[writes.rows, :, writes.columns]
        self.values[writes.rows, :, places, writes.offsets] = value[writes.rows, :, writes.columns]
        rows, columns, blocks = writes.landmark_rows, writes.landmark_columns, writes.landmark_blocks
        if len(rows) == 0:
            return
        places = self.place_of(blocks)
        self.landmark_keys[rows, :, places] = key[rows, :, columns]
        if self.shared_landmark:
            shared = self.landmark_keys[rows, :, 0]
            self.landmark_keys[rows, :, places] = shared
            self.keys[rows, :, places, self.block_size - 1] = shared

    def landmarks(self, count: int) -> Tensor:
        """Returns the landmark keys at places ``0..count - 1``, ``(B, G, count, D)``."""
        return self.landmark_keys[:, :, :count]

    def gather(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Fetches whole blocks.

        Args:
            places: ``(B, G, ...)`` place of each block; the second dimension may be 1 for "the same for all heads".

        Returns:
            keys and values, ``(B, G, ..., L, D)`` each.
        """
        batch, heads, count, length, dim = self.keys.shape
        places = places.expand(batch, heads, *places.shape[2:])
        origin = torch.arange(batch * heads, device=places.device).view(batch, heads, *[1] * (places.ndim - 2)) * count
        flat = (places + origin).flatten()
        shape = (*places.shape, length, dim)
        keys = self.keys.view(-1, length * dim).index_select(0, flat).view(shape)
        values = self.values.view(-1, length * dim).index_select(0, flat).view(shape)
        return keys, values

    def evict(self, needed_from: int) -> None:
        """Drops blocks ``1..needed_from - 1`` but for a few spare ones, a whole step at a time; block 0 stays."""
        drop = needed_from - SPARE_BLOCKS - self.first
        if drop < EVICTION_STEP or self.places == 0:
            return
        for tensor in (self.keys, self.values, self.landmark_keys):
            kept = tensor[:, :, 1 + drop :].clone()
            tensor[:, :, 1 : 1 + kept.shape[2]] = kept
        self.first += drop

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered."""
        if self.places:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self.landmark_keys = self.landmark_keys.index_select(0, rows)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.landmark_keys))


def _grow(old: Tensor, new: Tensor) -> Tensor:
    if old.numel():
        new[:, :, : old.shape[2]] = old
    return new
