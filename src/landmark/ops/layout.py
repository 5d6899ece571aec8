"""Keys laid out as blocks: dense pieces that matrix products can work on, for any grid of
landmarks.

A *piece* is ``W`` places of one block's text. On ordinary grids a piece is a block; where a few
blocks are far longer than the others, long ones are cut into several pieces, so that the places
stay linear in the number of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from landmark.blocks import Grid, key_grid, query_blocks

FAR = 2**62


class Layout(NamedTuple):
    """Where the keys of a block stand; ``R`` is B, or 1 where all rows are alike.

    Attributes:
        slot: (R, P, W) slot of the text at each place, ``FAR`` where there is none.
        place: (R, P, W) the same with S for none, to gather by; ``None`` where pieces are the keys
            as they lie, ``W = block_size``, the last place being the landmark.
        mark: (R, N) slot of each block's landmark, S where it cannot be opened (no landmark, or no
            text).
        owner: (R, P) block of each piece; ``None`` where pieces are blocks.
        own: (R, T) block of each query, -1 for padding.
        first: (R, T) first block of each query's document.
        length: S.
    """

    slot: Tensor
    place: Tensor | None
    mark: Tensor
    owner: Tensor | None
    own: Tensor
    first: Tensor
    length: int

    @property
    def opens(self) -> Tensor:
        """(R, N) whether a block can be a past block."""
        return self.mark < self.length

    def rows(self, rows: slice) -> Layout:
        """The layout of some rows of the batch."""
        if self.slot.shape[0] == 1:
            return self
        return self._replace(
            slot=self.slot[rows],
            place=None if self.place is None else self.place[rows],
            mark=self.mark[rows],
            owner=None if self.owner is None else self.owner[rows],
            own=self.own[rows],
            first=self.first[rows],
        )


def lay_out(
    length: int,
    queries: Tensor,
    *,
    block_size: int,
    starts: Tensor | None,
    segments: Tensor | None,
    landmarks: Tensor | None,
) -> Layout:
    """The layout of ``length`` keys for queries at slots (T,); ``segments`` and ``landmarks`` wait
    for a GPU.
    """
    if starts is None and segments is None and landmarks is None:
        return _regular(length, queries, block_size)
    grid = key_grid(
        length,
        block_size=block_size,
        starts=starts,
        segments=segments,
        landmarks=landmarks,
        device=queries.device,
    )
    own, first = query_blocks(grid, queries, block_size=block_size, regular=landmarks is None)
    if segments is None and landmarks is None:
        blocks = -(-length // block_size)
        width = block_size - 1
        cut = False
    else:
        blocks, width, cut = _sizes(grid)
    place, mark, owner = _pack(grid, blocks, width, cut)
    return Layout(torch.where(place < length, place, FAR), place, mark, owner, own, first, length)


def gather_slots(keys: Tensor, places: Tensor) -> Tensor:
    """Keys (B, G, S, D) at places (R, ...): (B, G, ..., D), zeros where the place is S."""
    rows, groups, _, dim = keys.shape
    padded = F.pad(keys, (0, 0, 0, 1))
    index = places.flatten(1)[:, None, :, None].expand(rows, groups, -1, dim)
    return torch.unflatten(padded.gather(2, index), 2, places.shape[1:])


def scatter_slots(pieces: Tensor, places: Tensor, length: int) -> Tensor:
    """The inverse of ``gather_slots`` where no place repeats: (B, G, ..., D) to (B, G, S, D)."""
    rows, groups, dim = *pieces.shape[:2], pieces.shape[-1]
    flat = pieces.reshape(rows, groups, -1, dim)
    index = places.flatten(1)[:, None, :, None].expand_as(flat)
    return flat.new_zeros(rows, groups, length + 1, dim).scatter_(2, index, flat)[:, :, :length]


def as_pieces(keys: Tensor, layout: Layout) -> Tensor:
    """Keys (B, G, S, D) as (B, G, P, W, D)."""
    if layout.place is not None:
        return gather_slots(keys, layout.place)
    _, pieces, width = layout.slot.shape
    padded = F.pad(keys, (0, 0, 0, pieces * width - layout.length))
    return torch.unflatten(padded, 2, (pieces, width))


def from_pieces(pieces: Tensor, layout: Layout) -> Tensor:
    """Sums (B, G, P, W, D) back at the slots of the keys (B, G, S, D)."""
    if layout.place is not None:
        return scatter_slots(pieces, layout.place, layout.length)
    return pieces.flatten(2, 3)[:, :, : layout.length]


def _regular(length: int, queries: Tensor, block_size: int) -> Layout:
    blocks = -(-length // block_size)
    slot = torch.arange(blocks * block_size, device=queries.device).view(1, blocks, block_size)
    text = (slot % block_size != block_size - 1) & (slot < length)
    mark = slot[:, :, -1].clamp(max=length)
    own = (queries // block_size)[None]
    return Layout(
        torch.where(text, slot, FAR), None, mark, None, own, torch.zeros_like(own), length
    )


def _text_counts(grid: Grid, blocks: int) -> Tensor:
    text = (~grid.landmark & (grid.block >= 0)).long()
    return text.new_zeros(text.shape[0], blocks).scatter_add_(1, grid.block.clamp(min=0), text)


def _sizes(grid: Grid) -> tuple[int, int, bool]:
    """Blocks of the fullest row, places of a piece, and whether some blocks must be cut."""
    length = grid.block.shape[1]
    most, longest = torch.stack([grid.block.max() + 1, _text_counts(grid, length).max()]).tolist()
    blocks = max(int(most), 1)
    width = max(int(longest), 1)
    if blocks * width <= 4 * length:
        return blocks, width, False
    return blocks, -(-length // blocks), True


def _pack(grid: Grid, blocks: int, width: int, cut: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """``place``, ``mark`` and ``owner`` of a layout."""
    rows, length = grid.block.shape
    text = ~grid.landmark & (grid.block >= 0)
    block = grid.block.clamp(min=0)
    slot = torch.arange(length, device=block.device).expand(rows, -1)
    counts = _text_counts(grid, blocks)
    rank = text.cumsum(1) - 1 - (counts.cumsum(1) - counts).gather(1, block)
    piece = block
    pieces = blocks
    owner = None
    if cut:
        parts = (counts + width - 1) // width
        piece = (parts.cumsum(1) - parts).gather(1, block) + rank // width
        rank = rank % width
        pieces = length // width + blocks
        owner = slot.new_zeros(rows, pieces + 1).scatter_(
            1, torch.where(text, piece, pieces), block
        )[:, :pieces]
    target = torch.where(text, piece * width + rank, pieces * width)
    place = slot.new_full((rows, pieces * width + 1), length).scatter_(1, target, slot)[:, :-1]
    opens = grid.landmark & (counts.gather(1, block) > 0)
    mark = slot.new_full((rows, blocks + 1), length).scatter_(
        1, torch.where(opens, block, blocks), slot
    )[:, :-1]
    return torch.unflatten(place, 1, (pieces, width)), mark, owner
