"""Rotary tables: rotations by an offset inside a block, and by a whole number of blocks.

Keys are stored rotated by their offset inside the block. A query is rotated by its own offset, and
then by the distance in blocks to wherever a block is placed (``positions.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from landmark.rotary import Rotary, Rotation


class RotaryTables:
    """Rotations that the layers of one rotary type share.

    Args:
        rotary: the rotary embedding.
        block_size: positions of a block.
    """

    def __init__(self, rotary: Rotary, block_size: int) -> None:
        self.rotary = rotary
        self.block_size = block_size
        self._by_offset: dict[tuple[torch.device, torch.dtype], Rotation] = {}
        self._by_distance: dict[tuple[torch.device, torch.dtype], Rotation] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RotaryTables:
        """Returns itself: all memories of a model share its tables."""
        return self

    def by_offset(self, offsets: Tensor, dtype: torch.dtype) -> Rotation:
        """Returns the rotation to an offset inside the block, ``0..block_size - 1``."""
        return self.offset_table(offsets.device, dtype).at(offsets)

    def offset_table(self, device: torch.device, dtype: torch.dtype) -> Rotation:
        """Returns the rotations to all offsets inside the block."""
        key = (device, dtype)
        if key not in self._by_offset:
            offsets = torch.arange(self.block_size, device=device)
            self._by_offset[key] = self.rotary.rotation(offsets, dtype)
        return self._by_offset[key]

    def by_distance(self, distances: Tensor, dtype: torch.dtype, largest: int) -> Rotation:
        """Returns the rotation by whole blocks; ``distances`` are clamped to ``0..largest``."""
        table = self.distance_table(distances.device, dtype, largest)
        return table.at(distances.clamp(0, largest))

    def distance_table(self, device: torch.device, dtype: torch.dtype, largest: int) -> Rotation:
        """Returns the rotations by ``0..largest`` blocks, and perhaps by more."""
        key = (device, dtype)
        if key not in self._by_distance or len(self._by_distance[key].cos) <= largest:
            blocks = torch.arange(2 * largest + 2, device=device)
            self._by_distance[key] = self.rotary.rotation(blocks * self.block_size, dtype)
        return self._by_distance[key]

    def data_pointers(self) -> tuple[int, ...]:
        """Returns the addresses of all tables, which a captured CUDA graph reads."""
        tables = (*self._by_offset.values(), *self._by_distance.values())
        return tuple(each.cos.data_ptr() for each in tables)
