"""Block-sparse index of selected blocks: from tiles of queries to blocks (CSR), and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class BlockLists(NamedTuple):
    """Which tiles of queries read which blocks, because some query of a tile selected the block.

    Only blocks that are past blocks of all queries of the tile are listed; with ``origins``, of all
    its queries in the document of the first of them. The kernels visit the others, at the tile's
    own blocks, in any case.

    Attributes:
        blocks: (B, H, tiles, M) int32, the blocks of each tile in ascending order, then fill. They
            are counted from the first of their document.
        counts: (B, H, tiles) int32, how many blocks a tile has.
        tiles: (B, H, tiles * M) int32, the tiles of block 0, then those of block 1, and so on.
        indptr: (B, H, N + 1) int32, the tiles of block ``n`` are
            ``tiles[indptr[n] : indptr[n + 1]]``. With ``origins``, ``n`` is the window of
            ``block_size`` slots of the row in which the block begins: no other finished block
            begins there.
    """

    blocks: Tensor
    counts: Tensor
    tiles: Tensor
    indptr: Tensor


def build_block_lists(
    selected: Tensor,
    starts: Tensor | None,
    origins: Tensor | None,
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
        origins: (B, S) int32, first slot of each slot's document; ``None`` where a row is one.
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
    if origins is not None:
        # A tile's list is that of the document of its first query.
        start = origins[:, first]
        spread = start.repeat_interleave(rows, dim=1)[:, :queries]
        is_listed = origins[:, query_start : query_start + queries] == spread
        selected = torch.where(is_listed[:, None, :, None], selected, -1)
    elif starts is not None:
        start = starts.clamp(max=keys)[:, None]
    else:
        start = torch.zeros(1, 1, device=device, dtype=torch.int32)
    # Blocks before ``n_clear`` are past blocks of all queries of a tile.
    n_clear = ((first - start) // block_size).clamp(min=0)
    n_clear = torch.minimum(n_clear, (keys - start) // block_size)[:, None, :, None]
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
    number = listed
    if origins is not None:
        window = (start // block_size)[:, None, :, None]
        number = torch.where(listed < blocks, listed + window, blocks)
    tile = torch.arange(tiles, device=device)[:, None]
    pairs = (number.long() * tiles + tile).flatten(2).sort(dim=-1).values
    first_pairs = torch.arange(blocks + 1, device=device).expand(batch, heads, -1).contiguous()
    indptr = torch.searchsorted(pairs, first_pairs * tiles).int()
    return BlockLists(listed, counts, (pairs % tiles).int(), indptr)
