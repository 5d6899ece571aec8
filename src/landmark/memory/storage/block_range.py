"""Which blocks of a layer are kept, and at which index of a dense tensor each stands."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockRange:
    """Block 0 and all blocks from ``first`` on are kept; a store and its pool share one range.

    Index 0 holds block 0. Index ``i > 0`` holds block ``first + i - 1``. ``first`` grows when
    blocks are evicted, for all rows at once.
    """

    def __init__(self) -> None:
        self.first = 1

    def index_of(self, blocks: Tensor) -> Tensor:
        """Returns the index of each block; only blocks that are kept have one."""
        return (blocks - self.first + 1).clamp_(min=0)

    def block_of(self, index: Tensor) -> Tensor:
        """Returns the block at each index."""
        return torch.where(index == 0, 0, index + self.first - 1)

    def blocks_before(self, block: int, device: torch.device) -> Tensor:
        """Returns the kept blocks before ``block``, ascending; block 0 always."""
        index = torch.arange(self.count_before(block), device=device)
        return self.block_of(index)

    def count_before(self, block: int) -> int:
        """Returns how many kept blocks are before ``block``, at least 1."""
        return max(1, block - self.first + 1)
