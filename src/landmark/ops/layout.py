"""Keys laid out as blocks, so that dense matrix products can work on any grid of landmarks.

A *piece* holds up to ``W`` text keys of one block. Mostly a piece is a whole block. Where a few
blocks are far longer than the others, long ones are cut into several pieces, so that the memory
stays linear in the number of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from landmark.blocks import SlotGrid, key_grid, query_blocks

FAR = 2**62  # a slot behind every query


class BlockLayout(NamedTuple):
    """Where the keys of each block stand; ``R`` is B, or 1 where all rows are alike.

    Attributes:
        slot: (R, P, W) slot of each text key of a piece; ``FAR`` where there is none.
        gather_slot: (R, P, W) the same with S where there is none, to gather by. ``None`` where the
            pieces are the keys as they lie, with ``W = block_size`` and the landmark as last key.
        landmark_slot: (R, N) slot of each block's landmark; S where the block cannot be a past
            block, because it has no landmark or no text.
        piece_block: (R, P) block of each piece; ``None`` where pieces are blocks.
        own_block: (R, T) own block of each query, -1 for padding.
        first_block: (R, T) first block of each query's document.
        length: S, the number of keys.
    """

    slot: Tensor
    gather_slot: Tensor | None
    landmark_slot: Tensor
    piece_block: Tensor | None
    own_block: Tensor
    first_block: Tensor
    length: int

    @property
    def can_be_past(self) -> Tensor:
        """(R, N) whether a block can be a past block."""
        return self.landmark_slot < self.length

    def rows(self, rows: slice) -> BlockLayout:
        """Returns the layout of some rows of the batch."""
        if self.slot.shape[0] == 1:
            return self
        return self._replace(
            slot=self.slot[rows],
            gather_slot=None if self.gather_slot is None else self.gather_slot[rows],
            landmark_slot=self.landmark_slot[rows],
            piece_block=None if self.piece_block is None else self.piece_block[rows],
            own_block=self.own_block[rows],
            first_block=self.first_block[rows],
        )


def lay_out(
    length: int,
    queries: Tensor,
    *,
    block_size: int,
    starts: Tensor | None,
    segments: Tensor | None,
    landmarks: Tensor | None,
) -> BlockLayout:
    """Returns the layout of ``length`` keys for queries at slots (T,).

    With ``segments`` or ``landmarks`` it waits for the GPU, as sizes depend on their contents.
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
    own_block, first_block = query_blocks(
        grid, queries, block_size=block_size, regular=landmarks is None
    )
    if segments is None and landmarks is None:
        sizes = _PieceSizes(blocks=-(-length // block_size), width=block_size - 1, cut=False)
    else:
        sizes = _piece_sizes(grid)
    gather_slot, landmark_slot, piece_block = _pack(grid, sizes)
    return BlockLayout(
        slot=torch.where(gather_slot < length, gather_slot, FAR),
        gather_slot=gather_slot,
        landmark_slot=landmark_slot,
        piece_block=piece_block,
        own_block=own_block,
        first_block=first_block,
        length=length,
    )


def gather_slots(keys: Tensor, slots: Tensor) -> Tensor:
    """Gathers keys (B, G, S, D) at slots (R, ...) as (B, G, ..., D); zeros where a slot is S."""
    rows, groups, _, dim = keys.shape
    padded = F.pad(keys, (0, 0, 0, 1))
    index = slots.flatten(1)[:, None, :, None].expand(rows, groups, -1, dim)
    return torch.unflatten(padded.gather(2, index), 2, slots.shape[1:])


def scatter_slots(pieces: Tensor, slots: Tensor, length: int) -> Tensor:
    """Inverts ``gather_slots`` where no slot repeats: (B, G, ..., D) to (B, G, S, D)."""
    rows, groups = pieces.shape[:2]
    dim = pieces.shape[-1]
    flat = pieces.reshape(rows, groups, -1, dim)
    index = slots.flatten(1)[:, None, :, None].expand_as(flat)
    return flat.new_zeros(rows, groups, length + 1, dim).scatter_(2, index, flat)[:, :, :length]


def as_pieces(keys: Tensor, layout: BlockLayout) -> Tensor:
    """Returns keys (B, G, S, D) as pieces (B, G, P, W, D)."""
    if layout.gather_slot is not None:
        return gather_slots(keys, layout.gather_slot)
    _, pieces, width = layout.slot.shape
    padded = F.pad(keys, (0, 0, 0, pieces * width - layout.length))
    return torch.unflatten(padded, 2, (pieces, width))


def from_pieces(pieces: Tensor, layout: BlockLayout) -> Tensor:
    """Returns pieces (B, G, P, W, D) at the slots of the keys, (B, G, S, D)."""
    if layout.gather_slot is not None:
        return scatter_slots(pieces, layout.gather_slot, layout.length)
    return pieces.flatten(2, 3)[:, :, : layout.length]


def _regular(length: int, queries: Tensor, block_size: int) -> BlockLayout:
    blocks = -(-length // block_size)
    slot = torch.arange(blocks * block_size, device=queries.device).view(1, blocks, block_size)
    is_text = (slot % block_size != block_size - 1) & (slot < length)
    own_block = (queries // block_size)[None]
    return BlockLayout(
        slot=torch.where(is_text, slot, FAR),
        gather_slot=None,
        landmark_slot=slot[:, :, -1].clamp(max=length),
        piece_block=None,
        own_block=own_block,
        first_block=torch.zeros_like(own_block),
        length=length,
    )


class _PieceSizes(NamedTuple):
    """How blocks become pieces.

    Attributes:
        blocks: N, blocks of the row that has most.
        width: W, text keys of a piece at most.
        cut: whether some blocks are cut into several pieces.
    """

    blocks: int
    width: int
    cut: bool


def _piece_sizes(grid: SlotGrid) -> _PieceSizes:
    length = grid.block.shape[1]
    most, longest = torch.stack([grid.block.max() + 1, _text_counts(grid, length).max()]).tolist()
    blocks = max(int(most), 1)
    width = max(int(longest), 1)
    if blocks * width <= 4 * length:
        return _PieceSizes(blocks, width, cut=False)
    return _PieceSizes(blocks, -(-length // blocks), cut=True)


def _text_counts(grid: SlotGrid, blocks: int) -> Tensor:
    """Returns (R, blocks), the text keys of each block."""
    is_text = (~grid.landmark & (grid.block >= 0)).long()
    zeros = is_text.new_zeros(is_text.shape[0], blocks)
    return zeros.scatter_add_(1, grid.block.clamp(min=0), is_text)


def _pack(grid: SlotGrid, sizes: _PieceSizes) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns ``gather_slot``, ``landmark_slot`` and ``piece_block`` of a layout."""
    rows, length = grid.block.shape
    blocks = sizes.blocks
    width = sizes.width
    is_text = ~grid.landmark & (grid.block >= 0)
    block = grid.block.clamp(min=0)
    slot = torch.arange(length, device=block.device).expand(rows, -1)
    counts = _text_counts(grid, blocks)
    rank = is_text.cumsum(1) - 1 - (counts.cumsum(1) - counts).gather(1, block)
    piece = block
    pieces = blocks
    piece_block = None
    if sizes.cut:
        parts = (counts + width - 1) // width
        piece = (parts.cumsum(1) - parts).gather(1, block) + rank // width
        rank = rank % width
        pieces = length // width + blocks
        piece_block = slot.new_zeros(rows, pieces + 1).scatter_(
            1, torch.where(is_text, piece, pieces), block
        )[:, :pieces]
    # What is no text, or no landmark of a past block, goes to one more column, which is cut off.
    target = torch.where(is_text, piece * width + rank, pieces * width)
    gather_slot = slot.new_full((rows, pieces * width + 1), length)
    gather_slot = gather_slot.scatter_(1, target, slot)[:, :-1]
    opens = grid.landmark & (counts.gather(1, block) > 0)
    landmark_slot = slot.new_full((rows, blocks + 1), length)
    landmark_slot = landmark_slot.scatter_(1, torch.where(opens, block, blocks), slot)[:, :-1]
    return torch.unflatten(gather_slot, 1, (pieces, width)), landmark_slot, piece_block
