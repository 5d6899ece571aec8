"""Reads one layer's memory: selects blocks for the queries of a call, and attends to them.

A call is computed in slabs of own blocks, so that scores and copies stay within a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from landmark.memory.context import LayerContext
from landmark.memory.eager import Attended, PlacedBlocks
from landmark.memory.eager import attend as attend_eager
from landmark.memory.geometry import CallGeometry, QueryGrid
from landmark.memory.kernel_limits import FEW_QUERIES, FEW_WIDTH, FUSED_TOP_K
from landmark.memory.landmark_index import LandmarkIndex
from landmark.memory.positions import SCHEMES
from landmark.memory.retrieval import (
    COPIES,
    SLAB_BYTES,
    Retrieval,
    Selection,
    Selector,
    TokenHeadSelector,
    select_pinned,
)


class ReadResult(NamedTuple):
    """What a call read.

    Attributes:
        output: ``(B, T, H, D)``.
        retrieval: what was retrieved, where it was asked for.
    """

    output: Tensor
    retrieval: Retrieval | None


@dataclass(frozen=True)
class Slabs:
    """How much of a call is computed at once.

    Attributes:
        own_blocks: own blocks.
        slots: slots of each own block.
    """

    own_blocks: int
    slots: int


class MemoryReader:
    """Selects blocks of one layer and attends to them, in plain PyTorch or by kernels.

    Args:
        layer: the layer's index.
        selector: who shares a selection of blocks.
    """

    def __init__(self, layer: int, selector: Selector) -> None:
        self.layer = layer
        self.selector = selector

    def read(
        self,
        query: Tensor,
        geometry: CallGeometry,
        context: LayerContext,
        *,
        retrieve: bool,
        fused: bool,
        record: bool,
        pinned: Tensor | None = None,
    ) -> ReadResult:
        """Attends; the keys of the call were appended.

        Args:
            query: ``(B, G, R, T, D)``, rotated by its offset inside the block.
            geometry: the call.
            context: the layer.
            retrieve: whether to retrieve; otherwise the local blocks and block 0 are read.
            fused: whether the Triton kernels run.
            record: whether to return what was retrieved.
            pinned: as for ``LayerMemory.attend``.
        """
        query = to_grid(query, geometry.grid)
        if self.selector.keeps_state:
            self.selector.begin_call(query, geometry, context, retrieve=retrieve)
        reads_sink = geometry.candidates > 0 and not retrieve
        slabs = self._slabs(query, geometry, context, retrieve=retrieve, fused=fused)
        outputs = []
        found = []
        for begin in range(0, query.shape[3], slabs.own_blocks):
            end = begin + slabs.own_blocks
            grid = geometry.grid
            part = query
            if slabs.own_blocks < query.shape[3]:
                grid = grid.narrow(begin, end)
                part = query[:, :, :, begin:end]
            shared = _shared_blocks(grid, context, with_sink=reads_sink)
            selection = None
            if retrieve and pinned is not None:
                selection = select_pinned(pinned, grid, context.config)
            elif retrieve:
                selection = self._select(
                    part, grid, geometry.candidates, context, is_first=begin == 0, fused=fused
                )
            attended = self._attend(part, grid, shared, selection, context, slabs, fused=fused)
            outputs.append(attended.output)
            if record and selection is not None:
                blocks = torch.where(selection.valid, selection.blocks, -1)
                found.append((blocks.expand(attended.gates.shape), attended.gates))
        output = from_grid(torch.cat(outputs, dim=3), geometry)
        if not record:
            return ReadResult(output, None)
        if not found:
            return ReadResult(output, self._nothing_retrieved(query, geometry))
        blocks, weights = (torch.cat(parts, dim=3) for parts in zip(*found, strict=True))
        return ReadResult(output, self._retrieval(blocks, weights, geometry))

    def takes_few(self, query: Tensor, geometry: CallGeometry, context: LayerContext) -> bool:
        """Returns whether the decode kernels take a call: few queries of one own block a row."""
        _, _, repeats, width, _ = query.shape
        is_one_block = geometry.grid.own.shape[1] == 1
        is_few = width <= FEW_WIDTH and repeats * width <= FEW_QUERIES
        return self.selects_fused(context.index) and is_one_block and is_few

    def selects_fused(self, index: LandmarkIndex | None) -> bool:
        """Returns whether kernels can select: they compute ``TokenHeadSelector.select`` alone."""
        return (
            type(self.selector).select is TokenHeadSelector.select
            and index is None
            and self.selector.config.top_k <= FUSED_TOP_K
        )

    def decode(
        self,
        query: Tensor,
        geometry: CallGeometry,
        context: LayerContext,
        *,
        record: bool,
    ) -> ReadResult:
        """Reads as ``read`` by the kernels for few queries ``(B, G, R, 1, W, D)``, on the grid."""
        from landmark.memory.triton.decode import decode

        decoded = decode(query, geometry.grid, geometry.candidates, context)
        if not record:
            return ReadResult(decoded.output, None)
        retrieval = self._retrieval(decoded.blocks, decoded.gates, geometry)
        return ReadResult(decoded.output, retrieval)

    def _select(
        self,
        query: Tensor,
        grid: QueryGrid,
        candidates: int,
        context: LayerContext,
        *,
        is_first: bool,
        fused: bool,
    ) -> Selection:
        if fused and self.selects_fused(context.index):
            from landmark.memory.triton.prefill import select

            return select(query, grid, candidates, context)
        return self.selector.select(query, grid, candidates, context, is_first=is_first)

    def _attend(
        self,
        query: Tensor,
        grid: QueryGrid,
        shared: PlacedBlocks,
        selection: Selection | None,
        context: LayerContext,
        slabs: Slabs,
        *,
        fused: bool,
    ) -> Attended:
        """Attends some own blocks, some slots of each at a time."""
        if fused:
            from landmark.memory.triton.prefill import attend
        else:
            attend = attend_eager
        selected = None
        if selection is not None:
            selected = _placed(selection, query, grid, context)
        if query.shape[4] <= slabs.slots:
            return attend(query, grid, shared, selected, context)
        parts = []
        for begin in range(0, query.shape[4], slabs.slots):
            slots = slice(begin, begin + slabs.slots)
            some = None
            if selected is not None:
                some = PlacedBlocks(
                    selected.blocks[:, :, :, :, slots], selected.distances[:, :, :, :, slots]
                )
            part = query[:, :, :, :, slots]
            parts.append(attend(part, grid.within(slots), shared, some, context))
        return Attended(
            output=torch.cat([part.output for part in parts], dim=4),
            gates=torch.cat([part.gates for part in parts], dim=4),
        )

    def _slabs(
        self,
        query: Tensor,
        geometry: CallGeometry,
        context: LayerContext,
        *,
        retrieve: bool,
        fused: bool,
    ) -> Slabs:
        """Returns how much fits the budget of scratch memory."""
        batch, groups, repeats, blocks, width, dim = query.shape
        size = context.config.block_size
        top_k = context.config.top_k
        local = geometry.grid.local.shape[-1]
        itemsize = query.element_size()
        heads = batch * groups * repeats
        score_bytes = COPIES * heads * max(itemsize, 4)
        block_bytes = 2 * size * dim * itemsize
        if fused:
            # The kernels copy no blocks and keep no scores. Lists of selected blocks remain.
            query_bytes = COPIES * heads * (top_k * 8 + dim * 4)
            own_block_bytes = 0
            if retrieve and context.store.pool.needs_fetch:
                fetched_heads = repeats if self.selector.per_query_head else 1
                query_bytes += batch * groups * fetched_heads * top_k * block_bytes
        else:
            query_bytes = score_bytes * (local + 2) * size
            own_block_bytes = batch * groups * (local + 2) * block_bytes
            if retrieve:
                query_bytes += heads * top_k * (3 * dim * itemsize + COPIES * 8)
        selection_bytes = 0
        if retrieve and self.selector.needs_every_score:
            selection_bytes = score_bytes * geometry.candidates
        budget = SLAB_BYTES[query.device.type]
        of_own_block = width * (query_bytes + selection_bytes) + own_block_bytes
        own_blocks = min(blocks, max(1, budget // of_own_block))
        if retrieve and self.selector.selects_whole_call:
            own_blocks = blocks
        slots = min(width, max(1, budget // (own_blocks * query_bytes)))
        return Slabs(own_blocks, slots)

    def _nothing_retrieved(self, query: Tensor, geometry: CallGeometry) -> Retrieval:
        batch, groups, repeats = query.shape[:3]
        shape = (batch, groups * repeats, geometry.flat_index.shape[1])
        slots = geometry.slots.cpu()
        # A selector selects top_k blocks at most.
        blocks = torch.full((*shape, self.selector.config.top_k), -1)
        return Retrieval(self.layer, slots, blocks, torch.zeros(blocks.shape, dtype=query.dtype))

    def _retrieval(self, blocks: Tensor, weights: Tensor, geometry: CallGeometry) -> Retrieval:
        """Returns what was retrieved ``(B, G, R, n, W, K)``, by head and column."""
        slots = geometry.slots.cpu()
        is_nobody = slots[:, None, :, None] < 0
        blocks = from_grid(blocks.long(), geometry).transpose(1, 2).cpu()
        weights = from_grid(weights, geometry).transpose(1, 2).cpu()
        return Retrieval(
            layer=self.layer,
            positions=slots,
            blocks=blocks.masked_fill(is_nobody, -1),
            weights=weights.masked_fill(is_nobody, 0),
        )


def to_grid(query: Tensor, grid: QueryGrid) -> Tensor:
    """Puts queries on the grid: ``(B, G, R, T, D)`` to ``(B, G, R, n, W, D)``."""
    rows = torch.arange(len(query), device=query.device)[:, None, None]
    return query.permute(0, 3, 1, 2, 4)[rows, grid.columns].permute(0, 3, 4, 1, 2, 5)


def from_grid(x: Tensor, geometry: CallGeometry) -> Tensor:
    """Takes results of queries from the grid: ``(B, G, R, n, W, X)`` to ``(B, T, H, X)``."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    flat = x.permute(0, 3, 4, 1, 2, 5).flatten(1, 2)
    return flat[rows, geometry.flat_index].flatten(2, 3)


def _shared_blocks(grid: QueryGrid, context: LayerContext, *, with_sink: bool) -> PlacedBlocks:
    """Returns the local blocks of each own block, and block 0 behind them if asked for."""
    distances = torch.where(grid.local >= 0, grid.own[..., None] - grid.local, -1)
    if not with_sink:
        return PlacedBlocks(grid.local, distances)
    is_older = (grid.local_first > 0)[:, None, None, :, None, None]
    scheme = SCHEMES[context.config.positions]
    sink = torch.zeros_like(is_older, dtype=grid.own.dtype)
    distance = scheme.distances(sink, is_older, grid, context.config).masked_fill(~is_older, -1)
    return PlacedBlocks(
        blocks=torch.cat((grid.local, sink[:, 0, 0, :, 0]), dim=-1),
        distances=torch.cat((distances, distance[:, 0, 0, :, 0]), dim=-1),
    )


def _placed(
    selection: Selection, query: Tensor, grid: QueryGrid, context: LayerContext
) -> PlacedBlocks:
    """Returns selected blocks at the distances that the position scheme gives them."""
    shape = (*selection.blocks.shape[:3], *query.shape[3:5], selection.blocks.shape[-1])
    blocks = selection.blocks.expand(shape)
    valid = selection.valid.expand(shape)
    scheme = SCHEMES[context.config.positions]
    distances = scheme.distances(blocks, valid, grid, context.config)
    return PlacedBlocks(blocks, distances.masked_fill(~valid, -1))
