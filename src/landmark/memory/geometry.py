"""Geometry of one call: which slots it adds, and which blocks its queries may see.

It is computed once for each call and shared by all layers, from block indices alone. Queries stand
on a grid ``(B, n, W)``: ``n`` own blocks with ``W`` slots each. The queries of one own block share
their local blocks, so the grid lets them be computed together. In a call inside one block ``W`` is
the number of its slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from landmark.config import LandmarkConfig

Moved = TypeVar("Moved")


@dataclass(frozen=True)
class QueryGrid:
    """Queries by own block. All tensors hold integers unless said otherwise; -1 is no block.

    Attributes:
        own: ``(B, n)`` own block.
        offsets: ``(B, n, W)`` offset of each query inside its own block.
        valid: ``(B, n, W)`` bool, whether a query stands there.
        columns: ``(B, n, W)`` column of the call whose query stands there.
        local_first: ``(B, n)`` first local block. Older blocks are read by retrieval only.
        local: ``(B, n, m)`` local finished blocks, oldest first.
    """

    own: Tensor
    offsets: Tensor
    valid: Tensor
    columns: Tensor
    local_first: Tensor
    local: Tensor

    def narrow(self, begin: int, end: int) -> QueryGrid:
        """Returns the own blocks ``begin..end - 1`` of every row."""
        return QueryGrid(*(getattr(self, each.name)[:, begin:end] for each in fields(self)))

    def within(self, slots: slice) -> QueryGrid:
        """Returns these slots of every own block."""
        return replace(
            self,
            offsets=self.offsets[..., slots],
            valid=self.valid[..., slots],
            columns=self.columns[..., slots],
        )


@dataclass(frozen=True)
class CacheWrites:
    """Where the new slots of a call are written. All tensors are ``(M,)`` integers.

    Entry ``i`` is column ``columns[i]`` of row ``rows[i]``. The landmarks among them are listed
    once more, with the block that each closes.

    Attributes:
        rows: row of each slot.
        columns: its column in the call.
        blocks: its block.
        offsets: its offset inside the block.
        landmark_rows: row of each landmark.
        landmark_columns: its column in the call.
        landmark_blocks: the block that it closes.
    """

    rows: Tensor
    columns: Tensor
    blocks: Tensor
    offsets: Tensor
    landmark_rows: Tensor
    landmark_columns: Tensor
    landmark_blocks: Tensor


@dataclass(frozen=True)
class CallGeometry:
    """Geometry of one call.

    Attributes:
        grid: the queries by own block.
        flat_index: ``(B, T)`` where on the flattened grid each column's query stands.
        offsets: ``(B, T)`` offset of each column inside its block.
        slots: ``(B, T)`` slot of each column, -1 where a row has none.
        writes: where the call's keys and values are written.
        filled_before: of each row, slots of its first own block that came in earlier calls.
        own_spans: of each row, its first and last own block.
        finished_blocks: row and block of each landmark, in the order of ``writes``.
        blocks: blocks that exist after the call in the longest row, an unfinished one included.
        candidates: blocks ``0..candidates - 1`` may be retrieved by some query.
        needed_from: the lowest block but 0 that this call or a later one may see.
        local_from: the same for a layer that does not retrieve.
    """

    grid: QueryGrid
    flat_index: Tensor
    offsets: Tensor
    slots: Tensor
    writes: CacheWrites
    filled_before: list[int]
    own_spans: list[tuple[int, int]]
    finished_blocks: list[tuple[int, int]]
    blocks: int
    candidates: int
    needed_from: int
    local_from: int


def make_geometry(starts: list[int], lengths: list[int], config: LandmarkConfig) -> CallGeometry:
    """Returns the geometry of a call that adds ``lengths[b]`` slots to a row of ``starts[b]``
    slots.

    Rows are aligned at their left: row ``b`` uses the columns ``0..lengths[b] - 1`` of
    ``max(lengths)``. Tensors are made on the CPU; ``move`` takes them to a device.
    """
    size = config.block_size
    start = torch.tensor(starts)[:, None]
    length = torch.tensor(lengths)[:, None]
    width = max(max(lengths), 1)
    column = torch.arange(width)
    slots = start + column
    first = start // size
    last = torch.clamp(start + length - 1, min=start) // size
    spanned = int((last - first).max()) + 1
    if spanned == 1:
        columns = column.expand(len(starts), 1, width)
        offsets = (slots % size)[:, None]
        flat_index = column.expand(len(starts), width)
    else:
        offsets = torch.arange(size).expand(len(starts), spanned, size)
        first_slot = (first + torch.arange(spanned))[..., None] * size
        columns = first_slot + offsets - start[..., None]
        flat_index = (start % size + column).clamp(max=spanned * size - 1)
    own = torch.minimum(first + torch.arange(spanned), last)
    local_first = _local_first(own, first, config)
    reach = int((own - local_first).max())
    local = own[..., None] - reach + torch.arange(reach)
    grid = QueryGrid(
        own=own,
        offsets=offsets,
        valid=(columns >= 0) & (columns < length[..., None]),
        columns=columns.clamp(0, width - 1),
        local_first=local_first,
        local=torch.where(local >= local_first[..., None], local, -1),
    )
    is_new = column < length
    writes = _cache_writes(is_new, slots, size)
    landmark_rows = writes.landmark_rows.tolist()
    landmark_blocks = writes.landmark_blocks.tolist()
    first_blocks = [each // size for each in starts]
    return CallGeometry(
        grid=grid,
        flat_index=flat_index,
        offsets=slots % size,
        slots=torch.where(is_new, slots, -1),
        writes=writes,
        filled_before=[each % size for each in starts],
        own_spans=list(zip(first[:, 0].tolist(), last[:, 0].tolist(), strict=True)),
        finished_blocks=list(zip(landmark_rows, landmark_blocks, strict=True)),
        blocks=int(last.max()) + 1,
        candidates=0 if config.mode == "all" else int(local_first.max()),
        needed_from=min(oldest_needed(block, config) for block in first_blocks),
        local_from=min(max(0, block - config.local_blocks) for block in first_blocks),
    )


def oldest_needed(own: int, config: LandmarkConfig) -> int:
    """Returns the lowest block but 0 that a query whose own block is ``own`` may see."""
    if config.mode == "all" or config.max_blocks is None:
        return 0
    local = 0 if config.local == "chunk" else config.local_blocks
    return max(0, own - local - config.max_blocks)


def move(part: Moved, device: torch.device, *, own_memory: bool = False) -> Moved:
    """Returns a copy of a dataclass whose tensors, also in dataclasses inside, are on ``device``.

    ``own_memory``: each tensor is contiguous and in memory of its own, so that it can be written.
    """
    changes: dict[str, Any] = {}
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            layout = torch.contiguous_format if own_memory else torch.preserve_format
            changes[field.name] = value.to(device, copy=own_memory, memory_format=layout)
        elif is_dataclass(value):
            changes[field.name] = move(value, device, own_memory=own_memory)
    return replace(part, **changes)  # type: ignore[type-var]


def _local_first(own: Tensor, first: Tensor, config: LandmarkConfig) -> Tensor:
    """Returns the first local block of each own block.

    It is defined by index, or is the block in which the call begins (the paper's scheme).
    """
    if config.mode == "all":
        return torch.zeros_like(own)
    if config.local == "chunk":
        return first.expand_as(own)
    return (own - config.local_blocks).clamp(min=0)


def _cache_writes(is_new: Tensor, slots: Tensor, size: int) -> CacheWrites:
    rows, columns = is_new.nonzero(as_tuple=True)
    blocks = slots[rows, columns] // size
    offsets = slots[rows, columns] % size
    closes = offsets == size - 1
    return CacheWrites(
        rows=rows,
        columns=columns,
        blocks=blocks,
        offsets=offsets,
        landmark_rows=rows[closes],
        landmark_columns=columns[closes],
        landmark_blocks=blocks[closes],
    )
