"""Landmark attention in plain PyTorch, in memory linear in the number of keys.

Queries are taken one tile at a time. The backward pass computes a tile's scores again, so that no
T x S tensor is ever alive. Key/value heads are never expanded: the query heads that read one
key/value head are rows of one matrix product. Where ``top_k`` is far below the number of blocks,
only the landmarks are scored for all blocks, and the selected blocks are gathered.

A short call on a GPU without padding or ``top_k`` (training at a few hundred slots) is one tile
without any loop, which ``torch.compile`` fuses. Its products run in the dtype of the inputs, all
others at least in float32. Softmaxes always run at least in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from landmark.ops.layout import as_pieces, from_pieces, gather_slots, lay_out, scatter_slots
from landmark.ops.metadata import AttentionMetadata
from landmark.ops.tile import (
    Operands,
    TileView,
    select_blocks,
    tile_backward,
    tile_forward,
    view_of,
)

# Scores of a tile, in elements: small enough for a CPU's caches, large enough to fill a GPU.
CPU_TILE = 2**20
GPU_TILE = 2**25
# Most queries of a tile: the scores above the diagonal of a tile are computed for nothing.
TILE_QUERIES = 256
# Most slots of a call that is a single tile on a GPU.
DIRECT_SLOTS = 1024
# How many keys can be scored in their place for the price of one gathered key (measured, forward
# and backward).
CPU_GATHER = 8
GPU_GATHER = 100


def chunked(
    query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata
) -> tuple[Tensor, Tensor]:
    """Computes landmark attention tile by tile.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D).
        value: (B, G, S, D).
        metadata: the other arguments, as checked by ``landmark_attention``.

    Returns:
        Output (B, H, T, D) and the gate's log-sum-exp (B, H, T).
    """
    groups = key.shape[1]
    split = torch.unflatten(query, 1, (groups, query.shape[1] // groups))
    out, lse = _Chunked.apply(split, key, value, *metadata)  # type: ignore[no-untyped-call]
    return out.flatten(1, 2), lse.flatten(1, 2)


def is_direct(metadata: AttentionMetadata, query: Tensor, key: Tensor) -> bool:
    """Returns whether a call is one tile that is computed in the dtype of the inputs.

    Args:
        metadata: the arguments beside query, key and value.
        query: (B, G, H/G, T, D).
        key: (B, G, S, D).
    """
    regular = metadata.has_equal_blocks and metadata.starts is None and metadata.top_k is None
    short = max(query.shape[3], key.shape[2]) <= DIRECT_SLOTS
    large_steps = query.device.type != "cpu" or torch.compiler.is_compiling()
    return regular and short and large_steps and query.dtype != torch.float16


class _Chunked(torch.autograd.Function):
    """Autograd function on queries (B, G, H/G, T, D), keys and values (B, G, S, D)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        metadata = AttentionMetadata(*arguments)
        out, lse, selected = _forward(metadata, query, key, value)
        ctx.attention_metadata = metadata
        ctx.save_for_backward(query, key, value, out, lse, *selected)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *selected = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            grads = _backward(
                ctx.attention_metadata,
                query=query,
                key=key,
                value=value,
                out=out,
                lse=lse,
                selected=selected,
                grad=grad,
                grad_lse=grad_lse,
            )
        return (*grads, *(None for _ in ctx.attention_metadata))


class _Tile(NamedTuple):
    """Part of a call that is computed at once.

    Attributes:
        rows: rows of the batch.
        groups: key/value heads.
        queries: queries.
        blocks: blocks of keys, all that some of the queries may see.
    """

    rows: slice
    groups: slice
    queries: slice
    blocks: slice

    def of_queries(self, tensor: Tensor) -> Tensor:
        """Returns the tile's part of a tensor (B, G, H/G, T, ...), as a view."""
        return tensor[self.rows, self.groups][:, :, :, self.queries]


class _Tiling:
    """How a call is cut into tiles, which is the same in both passes."""

    def __init__(self, metadata: AttentionMetadata, query: Tensor, key: Tensor) -> None:
        self.metadata = metadata
        self.direct = is_direct(metadata, query, key)
        self.exact = torch.promote_types(query.dtype, torch.float32)
        self.dtype = query.dtype if self.direct else self.exact
        self.slots = torch.arange(query.shape[3], device=query.device) + metadata.query_start
        self.layout = lay_out(
            key.shape[2],
            self.slots,
            block_size=metadata.block_size,
            starts=metadata.starts,
            segments=metadata.segments,
            landmarks=metadata.landmarks,
        )
        keys = self.layout.slot.shape[1:].numel()
        self.gather = False
        self.per_query = query.shape[2] * keys  # scores, or numbers that are gathered
        if metadata.top_k is not None:
            gathered = (metadata.top_k + 1) * self.layout.slot.shape[2]
            cost = CPU_GATHER if query.device.type == "cpu" else GPU_GATHER
            self.gather = self.layout.piece_block is None and gathered * cost < keys
            if self.gather:
                self.per_query = query.shape[2] * (
                    gathered * query.shape[4] + self.layout.landmark_slot.shape[1]
                )

    def operands(self, key: Tensor, value: Tensor) -> Operands:
        """Returns keys, values and landmark keys laid out as blocks."""
        layout = self.layout
        key = key.to(self.dtype)
        value = value.to(self.dtype)
        keys = as_pieces(key, layout)
        values = as_pieces(value, layout)
        if layout.gather_slot is None:
            landmark_keys = keys[:, :, :, -1]
        else:
            landmark_keys = gather_slots(key, layout.landmark_slot)
        return Operands(keys, values, landmark_keys)

    def gradients(self, grads: Operands) -> tuple[Tensor, Tensor]:
        """Returns gradients of keys and values (B, G, S, D) from those of the operands."""
        layout = self.layout
        values = from_pieces(grads.values, layout)
        if layout.gather_slot is None:
            keys = torch.cat([grads.keys[:, :, :, :-1], grads.landmark_keys[:, :, :, None]], dim=3)
            return from_pieces(keys, layout), values
        keys = from_pieces(grads.keys, layout) + scatter_slots(
            grads.landmark_keys, layout.landmark_slot, layout.length
        )
        return keys, values

    def tiles(self, query: Tensor) -> Iterator[_Tile]:
        """Yields the tiles of a query (B, G, H/G, T, D)."""
        rows, groups, _, queries, _ = query.shape
        blocks = self.layout.landmark_slot.shape[1]
        if self.direct:
            yield _Tile(slice(0, rows), slice(0, groups), slice(0, queries), slice(0, blocks))
            return
        budget = max(1, (CPU_TILE if query.device.type == "cpu" else GPU_TILE) // self.per_query)
        step = min(queries, budget, TILE_QUERIES)
        group_step = min(groups, max(1, budget // step))
        row_step = min(rows, max(1, budget // (step * group_step)))
        parts = [slice(t, min(t + step, queries)) for t in range(0, queries, step)]
        spans = self._spans(parts, blocks)
        for row in range(0, rows, row_step):
            for group in range(0, groups, group_step):
                for part, span in zip(parts, spans, strict=True):
                    yield _Tile(
                        rows=slice(row, row + row_step),
                        groups=slice(group, group + group_step),
                        queries=part,
                        blocks=span,
                    )

    def _spans(self, parts: list[slice], blocks: int) -> list[slice]:
        """Returns for each slice of queries the blocks that some of them may see."""
        layout = self.layout
        metadata = self.metadata
        if layout.piece_block is not None:
            return [slice(0, blocks)] * len(parts)
        if metadata.has_equal_blocks:
            first = [0] * len(parts)
            last = [(metadata.query_start + each.stop - 1) // metadata.block_size for each in parts]
        else:
            lowest = torch.where(layout.own_block < 0, blocks, layout.first_block).amin(dim=0)
            ends = torch.stack([lowest, layout.own_block.amax(dim=0)]).tolist()
            first = [min(ends[0][each]) for each in parts]
            last = [max(ends[1][each]) for each in parts]
        spans = []
        for low, high in zip(first, last, strict=True):
            low = min(low, blocks - 1)
            spans.append(slice(low, max(low, min(high, blocks - 1)) + 1))
        return spans

    def view(self, tile: _Tile) -> TileView:
        """Returns what the queries of a tile may see, all past blocks included."""
        forced = self.metadata.forced
        return view_of(
            self.layout.rows(tile.rows),
            self.slots,
            queries=tile.queries,
            blocks=tile.blocks,
            scale=self.metadata.scale,
            forced=None if forced is None else forced[tile.rows],
        )

    def cut(self, operands: Operands, tile: _Tile) -> Operands:
        """Returns a tile's part of the operands, as views."""
        pieces = tile.blocks if self.layout.piece_block is None else slice(None)
        return Operands(
            keys=operands.keys[tile.rows, tile.groups, pieces],
            values=operands.values[tile.rows, tile.groups, pieces],
            landmark_keys=operands.landmark_keys[tile.rows, tile.groups, tile.blocks],
        )


def _forward(
    metadata: AttentionMetadata, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns output, log-sum-exp and the selected blocks of each tile."""
    exact = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(query)
    lse = query.new_full(query.shape[:4], -torch.inf, dtype=exact)
    selected: list[Tensor] = []
    if key.shape[2] == 0 or query.numel() == 0:
        return out, lse, selected
    tiling = _Tiling(metadata, query, key)
    operands = tiling.operands(key, value)
    for tile in tiling.tiles(query):
        part = tiling.cut(operands, tile)
        queries = tile.of_queries(query).to(tiling.dtype)
        view = tiling.view(tile)
        if metadata.top_k is not None:
            selected.append(select_blocks(queries, part.landmark_keys, view, metadata.top_k))
            view = view._replace(selected=selected[-1], gather=tiling.gather)
        tile_out, tile_lse = tile_forward(queries, part, view)
        if tiling.direct:
            return tile_out, tile_lse, selected
        tile.of_queries(out).copy_(tile_out)
        tile.of_queries(lse).copy_(tile_lse)
    return out, lse, selected


def _backward(
    metadata: AttentionMetadata,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: list[Tensor],
    grad: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    if key.shape[2] == 0 or query.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    tiling = _Tiling(metadata, query, key)
    operands = tiling.operands(key, value)
    delta = (grad.to(tiling.exact) * out.to(tiling.exact)).sum(dim=-1)
    delta = delta - torch.where(lse > -torch.inf, grad_lse, 0.0)
    if tiling.direct:
        whole = _Tile(slice(None), slice(None), slice(None), slice(None))
        d_query, sums = tile_backward(query, grad, delta, operands, tiling.view(whole))
        return d_query, *tiling.gradients(sums)
    d_query = torch.zeros_like(query)
    sums = Operands(*(torch.zeros_like(each) for each in operands))
    for number, tile in enumerate(tiling.tiles(query)):
        view = tiling.view(tile)
        if selected:
            view = view._replace(selected=selected[number], gather=tiling.gather)
        tile_d_query, additions = tile_backward(
            tile.of_queries(query).to(tiling.dtype),
            tile.of_queries(grad).to(tiling.dtype),
            tile.of_queries(delta),
            tiling.cut(operands, tile),
            view,
        )
        tile.of_queries(d_query).copy_(tile_d_query)
        for total, addition in zip(tiling.cut(sums, tile), additions, strict=True):
            total += addition
    d_key, d_value = tiling.gradients(sums)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype)
