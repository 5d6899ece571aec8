"""Block-sparse index of selected blocks: from tiles of queries to blocks (CSR), and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class BlockLists(NamedTuple):
    """Which tiles of queries read which blocks, because some query of a tile selected the block.

    Only blocks that are past blocks of all queries of the tile are listed. The kernels visit the
    others, at the tile's own blocks, in any case.

    Attributes:
        blocks: (B, H, tiles, M) int32, the blocks of each tile in ascending order, then fill.
        counts: (B, H, tiles) int32, how many blocks a tile has.
        tiles: (B, H, tiles * M) int32, the tiles of block 0, then those of block 1, and so on.
        indptr: (B, H, N + 1) int32, the tiles of block ``n`` are
            ``tiles[indptr[n] : indptr[n + 1]]``.
    """

    blocks: Tensor
    counts: Tensor
    tiles: Tensor
    indptr: Tensor


def build_block_lists(
    selected: Tensor,
    starts: Tensor | None,
    *,
    keys: int,
    block_size: int,
    query_start: int,
    rows: int,
) -> BlockLists:
    """Lists the selected blocks of each tile of queries, and the tiles of each block.

    Args:
        selected: (B, H, T, K) int32, blocks that each query selected, -1 for none.
        starts: (B,) int32, slot of each row's first text.
        keys: S.
        block_size: slots of a block, landmark included.
        query_start: slot of the first query.
        rows: queries of a tile.
    """
    batch, heads, queries, _ = selected.shape
    device = selected.device
    blocks = max(1, -(-keys // block_size))
    tiles = -(-queries // rows)
    first = torch.arange(tiles, device=device, dtype=torch.int32) * rows + query_start
    if starts is None:
        start = torch.zeros(1, device=device, dtype=torch.int32)
    else:
        start = starts.clamp(max=keys)
    # Blocks before ``n_clear`` are past blocks of all queries of a tile.
    n_clear = ((first - start[:, None]) // block_size).clamp(min=0)
    n_clear = torch.minimum(n_clear, (keys - start[:, None]) // block_size)[:, None, :, None]
    padded = pad(selected, (0, 0, 0, tiles * rows - queries), value=-1)
    each = padded.view(batch, heads, tiles, rows * selected.shape[3])
    each = torch.where((each >= 0) & (each < n_clear), each, blocks).sort(dim=-1).values
    is_new = (each < blocks) & (each != pad(each, (1, 0), value=-1)[..., :-1])
    counts = is_new.sum(dim=-1, dtype=torch.int32)
    # What is not new goes to one more column that is cut off.
    column = torch.where(is_new, is_new.cumsum(dim=-1) - 1, each.shape[-1])
    listed = torch.full(
        (*each.shape[:-1], each.shape[-1] + 1), blocks, dtype=torch.int32, device=device
    )
    listed = listed.scatter_(-1, column, torch.where(is_new, each, blocks))[..., :-1].contiguous()
    tile = torch.arange(tiles, device=device)[:, None]
    pairs = (listed.long() * tiles + tile).flatten(2).sort(dim=-1).values
    first_pairs = torch.arange(blocks + 1, device=device).expand(batch, heads, -1).contiguous()
    indptr = torch.searchsorted(pairs, first_pairs * tiles).int()
    return BlockLists(listed, counts, (pairs % tiles).int(), indptr)
