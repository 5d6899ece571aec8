"""What the queries of one call may see, by block index: computed once per call, shared by all
layers.

Queries stand on a *grid* ``(B, n, W)``: ``n`` own blocks, ``W`` places in each, so that the queries
of one block share what they see without choosing. A call inside one block keeps ``W`` at the number
of its slots.
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
    """Queries by own block; integers unless said otherwise, ``-1`` for no block.

    Attributes:
        own: ``(B, n)`` own block.
        offsets: ``(B, n, W)`` place of each query inside its own block.
        valid: ``(B, n, W)`` bool, whether a query stands there.
        columns: ``(B, n, W)`` column of the call whose query stands there.
        local_first: ``(B, n)`` first local block; everything older is past its reach and has to be
            retrieved.
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
        return QueryGrid(*(getattr(self, f.name)[:, begin:end] for f in fields(self)))

    def within(self, cut: slice) -> QueryGrid:
        """Returns these places of every own block."""
        return replace(
            self,
            offsets=self.offsets[..., cut],
            valid=self.valid[..., cut],
            columns=self.columns[..., cut],
        )


@dataclass(frozen=True)
class CacheWrites:
    """Where new slots are filed: entry ``i`` is column ``columns[i]`` of row ``rows[i]``; all
    ``(M,)`` integers.

    The landmarks among them are listed once more, with the block that each closes.
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
        cells: ``(B, T)`` where on the flattened grid each column's query stands.
        offsets: ``(B, T)`` place of each column inside its block.
        positions: ``(B, T)`` slot of each column, ``-1`` where a row has none.
        writes: where the call's keys are filed.
        within: slots of each row's first own block that came in earlier calls.
        spans: first and last own block of each row.
        closed: row and block of each landmark, in the order of ``writes``.
        blocks: blocks that exist after the call, an unfinished one included (the longest row's).
        candidates: blocks ``0..candidates - 1`` may be retrieved by some query.
        seen_from: lowest block but 0 that some query of this call or a later one may see.
        local_from: the same for a layer that does not retrieve.
    """

    grid: QueryGrid
    cells: Tensor
    offsets: Tensor
    positions: Tensor
    writes: CacheWrites
    within: list[int]
    spans: list[tuple[int, int]]
    closed: list[tuple[int, int]]
    blocks: int
    candidates: int
    seen_from: int
    local_from: int


def make_geometry(starts: list[int], lengths: list[int], config: LandmarkConfig) -> CallGeometry:
    """Plans a call that adds ``lengths[b]`` slots to a row ``b`` of ``starts[b]`` slots.

    Rows are aligned at their left: row ``b`` uses columns ``0..lengths[b] - 1`` of
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
        cells = column.expand(len(starts), width)
    else:
        offsets = torch.arange(size).expand(len(starts), spanned, size)
        columns = (first + torch.arange(spanned))[..., None] * size + offsets - start[..., None]
        cells = (start % size + column).clamp(max=spanned * size - 1)
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
    new = column < length
    writes = _writes(new, slots, size)
    return CallGeometry(
        grid=grid,
        cells=cells,
        offsets=slots % size,
        positions=torch.where(new, slots, -1),
        writes=writes,
        within=[s % size for s in starts],
        spans=list(zip(first[:, 0].tolist(), last[:, 0].tolist(), strict=True)),
        closed=list(
            zip(writes.landmark_rows.tolist(), writes.landmark_blocks.tolist(), strict=True)
        ),
        blocks=int(last.max()) + 1,
        candidates=0 if config.mode == "all" else int(local_first.max()),
        seen_from=min(oldest_needed(s // size, config) for s in starts),
        local_from=min(max(0, s // size - config.local_blocks) for s in starts),
    )


def oldest_needed(own: int, config: LandmarkConfig) -> int:
    """Lowest block, but for block 0, that a query whose own block is ``own`` may see."""
    if config.mode == "all" or config.max_blocks is None:
        return 0
    local = 0 if config.local == "chunk" else config.local_blocks
    return max(0, own - local - config.max_blocks)


def move(part: Moved, device: torch.device, *, apart: bool = False) -> Moved:
    """Returns a copy of a dataclass with its tensors, also those of dataclasses inside, on
    ``device``.

    ``apart``: each in memory of its own, so that it can be written to.
    """
    changes: dict[str, Any] = {}
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            kept = torch.contiguous_format if apart else torch.preserve_format
            changes[field.name] = value.to(device, copy=apart, memory_format=kept)
        elif is_dataclass(value):
            changes[field.name] = move(value, device, apart=apart)
    return replace(part, **changes)  # type: ignore[type-var]


def to_grid(query: Tensor, grid: QueryGrid) -> Tensor:
    """Puts queries on the grid: ``(B, G, R, T, D)`` to ``(B, G, R, n, W, D)``."""
    rows = torch.arange(len(query), device=query.device)[:, None, None]
    return query.permute(0, 3, 1, 2, 4)[rows, grid.columns].permute(0, 3, 4, 1, 2, 5)


def from_grid(x: Tensor, cells: Tensor) -> Tensor:
    """Takes what queries have got from the grid: ``(B, G, R, n, W, X)`` to ``(B, T, H, X)``."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x.permute(0, 3, 4, 1, 2, 5).flatten(1, 2)[rows, cells].flatten(2, 3)


def _local_first(own: Tensor, first: Tensor, config: LandmarkConfig) -> Tensor:
    """First local block of each own block: by index, or the block in which the call begins (the
    paper's scheme).
    """
    if config.mode == "all":
        return torch.zeros_like(own)
    if config.local == "chunk":
        return first.expand_as(own)
    return (own - config.local_blocks).clamp(min=0)


def _writes(new: Tensor, slots: Tensor, size: int) -> CacheWrites:
    rows, columns = new.nonzero(as_tuple=True)
    blocks = slots[rows, columns] // size
    offsets = slots[rows, columns] % size
    closing = offsets == size - 1
    return CacheWrites(
        rows, columns, blocks, offsets, rows[closing], columns[closing], blocks[closing]
    )
