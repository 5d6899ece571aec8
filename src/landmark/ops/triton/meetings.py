"""Which tiles of queries and which blocks meet because of a choice: the lists that the kernels walk
over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Meetings(NamedTuple):
    """Which tiles of queries read which blocks, as far as all of a tile's queries have the block in
    their past.

    Attributes:
        blocks: (B, H, tiles, M) int32, the blocks of each tile, side by side from the left.
        counts: (B, H, tiles) int32, how many.
        tiles: (B, H, tiles * M) int32, the tiles of all blocks, those of one block side by side.
        borders: (B, H, N + 1) int32, where in ``tiles`` those of each block begin.
    """

    blocks: Tensor
    counts: Tensor
    tiles: Tensor
    borders: Tensor


def meetings(
    chosen: Tensor,
    starts: Tensor | None,
    *,
    keys: int,
    block_size: int,
    query_start: int,
    rows: int,
) -> Meetings:
    """Which tiles of ``rows`` queries read which blocks because of a choice (B, H, T, K)."""
    batch, heads, queries, _ = chosen.shape
    blocks = max(1, -(-keys // block_size))
    tiles = -(-queries // rows)
    first = torch.arange(tiles, device=chosen.device, dtype=torch.int32) * rows + query_start
    start = (
        torch.zeros(1, device=chosen.device, dtype=torch.int32)
        if starts is None
        else starts.clamp(max=keys)
    )
    clear = ((first - start[:, None]) // block_size).clamp(min=0)
    clear = torch.minimum(clear, (keys - start[:, None]) // block_size)[:, None, :, None]
    padded = torch.nn.functional.pad(chosen, (0, 0, 0, tiles * rows - queries), value=-1)
    each = padded.view(batch, heads, tiles, rows * chosen.shape[3])
    each = torch.where((each >= 0) & (each < clear), each, blocks).sort(dim=-1).values
    new = (each < blocks) & (each != torch.nn.functional.pad(each, (1, 0), value=-1)[..., :-1])
    counts = new.sum(dim=-1, dtype=torch.int32)
    place = torch.where(new, new.cumsum(dim=-1) - 1, each.shape[-1])
    listed = torch.full(
        (*each.shape[:-1], each.shape[-1] + 1), blocks, dtype=torch.int32, device=chosen.device
    )
    listed = listed.scatter_(-1, place, torch.where(new, each, blocks))[..., :-1].contiguous()
    number = torch.arange(tiles, device=chosen.device)[:, None]
    pairs = (listed.long() * tiles + number).flatten(2).sort(dim=-1).values
    borders = (
        torch.arange(blocks + 1, device=chosen.device).expand(batch, heads, -1).contiguous() * tiles
    )
    borders = torch.searchsorted(pairs, borders).int()
    return Meetings(listed, counts, (pairs % tiles).int(), borders)
