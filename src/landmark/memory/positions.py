"""Where a remembered block is thought to stand: ``stingy`` or ``exact`` positions, as distances in
blocks.

Under ``stingy`` (paper, section 3.3.2) a prefix of ``top_k + 1`` slots of one block each stands
before the local context, so that any past maps into the positions the model was trained on. A query
whose own block follows ``n`` local blocks has its own block at slot ``top_k + 1 + n``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from landmark.memory.geometry import QueryGrid
from landmark.rotary import Rotary, Rotation


class RotaryTables:
    """Rotations by a place inside a block and by a whole number of blocks, shared by the layers of
    one rotary type.

    Args:
        rotary: the rotary embedding.
        block_size: positions of a block.
    """

    def __init__(self, rotary: Rotary, block_size: int) -> None:
        self.rotary = rotary
        self.block_size = block_size
        self._offsets: dict[tuple[torch.device, torch.dtype], Rotation] = {}
        self._blocks: dict[tuple[torch.device, torch.dtype], Rotation] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RotaryTables:
        """Itself: the tables of a model are the same for all its memories."""
        return self

    def by_offset(self, offsets: Tensor, dtype: torch.dtype) -> Rotation:
        """Returns the rotation to a place inside the block, ``0..block_size - 1``."""
        return self.offsets(offsets.device, dtype).at(offsets)

    def offsets(self, device: torch.device, dtype: torch.dtype) -> Rotation:
        """Returns the rotations to all places inside the block."""
        key = (device, dtype)
        if key not in self._offsets:
            self._offsets[key] = self.rotary.rotation(
                torch.arange(self.block_size, device=device), dtype
            )
        return self._offsets[key]

    def by_blocks(self, distances: Tensor, dtype: torch.dtype, largest: int) -> Rotation:
        """Returns the rotation by whole blocks; ``distances`` are clamped to ``0..largest``."""
        return self.blocks(distances.device, dtype, largest).at(distances.clamp(0, largest))

    def blocks(self, device: torch.device, dtype: torch.dtype, largest: int) -> Rotation:
        """Returns the rotations by ``0..largest`` blocks, and perhaps by more."""
        key = (device, dtype)
        if key not in self._blocks or len(self._blocks[key].cos) <= largest:
            count = torch.arange(2 * largest + 2, device=device)
            self._blocks[key] = self.rotary.rotation(count * self.block_size, dtype)
        return self._blocks[key]

    def depends(self) -> tuple[int, ...]:
        """Returns where the tables lie."""
        return tuple(
            each.cos.data_ptr() for each in (*self._offsets.values(), *self._blocks.values())
        )


def own_slot(grid: QueryGrid, top_k: int) -> Tensor:
    """Slot of each own block under ``stingy``, ``(B, n)``: its distance to slot 0, where old
    landmarks are scored.
    """
    return top_k + 1 + grid.own - grid.local_first


def final_distances(
    blocks: Tensor, valid: Tensor, grid: QueryGrid, top_k: int, positions: str
) -> Tensor:
    """Distance in blocks from each query's own block to the blocks it chose.

    Args:
        blocks: ``(B, G, R, n, W, K)`` chosen blocks, ascending, those not ``valid`` last.
        valid: same shape.
        grid: the queries.
        top_k: size of the prefix.
        positions: ``stingy`` or ``exact``.

    Returns:
        distances, shape of ``blocks``. Under ``stingy`` the ``k`` chosen blocks, ``r = 0..k - 1``,
        stand at slot ``r + (top_k - k) + [age < top_k]``: old ones packed to the left, recent ones
        at their true places.
    """
    own = grid.own[:, None, None, :, None, None]
    if positions == "exact":
        return own - blocks
    first = grid.local_first[:, None, None, :, None, None]
    rank = torch.arange(blocks.shape[-1], device=blocks.device)
    recent = (first - 1 - blocks < top_k).long()
    slot = rank + top_k - valid.sum(-1, keepdim=True) + recent
    return own_slot(grid, top_k)[:, None, None, :, None, None] - slot
