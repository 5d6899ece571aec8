"""Landmark attention in memory linear in the number of keys, in plain PyTorch, forward and
backward.

Queries are taken a tile at a time and the tile's scores are computed again in the backward pass, so
that no T x S tensor is ever alive. Key/value heads are never expanded: the R query heads of a group
are rows of one matrix product. With a ``top_k`` far below the number of blocks, the chosen blocks
are gathered and nothing else is scored but the landmarks.

A short regular batch on a GPU (training at a few hundred slots) is one tile without any loop, which
``torch.compile`` fuses; its products run in the dtype of the inputs, all others at least in
float32. Softmaxes always run at least in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from landmark.ops.layout import as_pieces, from_pieces, gather_slots, lay_out, scatter_slots
from landmark.ops.tile import Operands, View, choose, tile_backward, tile_forward, view_of

# Scores of a tile, in elements: small enough for a CPU's caches, large enough to fill a GPU.
CPU_TILE = 2**20
GPU_TILE = 2**25
# Queries of a tile at most, as the upper triangle inside a tile is computed for nothing.
TILE_QUERIES = 256
# Up to so many slots a regular call on a GPU is a single tile.
DIRECT_SLOTS = 1024
# A gathered key costs about as much as so many keys that are scored where they lie (measured,
# forward and backward).
CPU_GATHER = 8
GPU_GATHER = 100


class Call(NamedTuple):
    """The arguments beside the tensors that are differentiated."""

    block_size: int
    scale: float
    top_k: int | None
    query_start: int
    starts: Tensor | None
    segments: Tensor | None
    landmarks: Tensor | None

    @property
    def even(self) -> bool:
        """Whether every block of a row has the same size."""
        return self.segments is None and self.landmarks is None

    def is_direct(self, query: Tensor, key: Tensor) -> bool:
        """Whether the call is one tile computed in the dtype of the inputs."""
        regular = self.even and self.starts is None and self.top_k is None
        short = max(query.shape[3], key.shape[2]) <= DIRECT_SLOTS
        large_steps = query.device.type != "cpu" or torch.compiler.is_compiling()
        return regular and short and large_steps and query.dtype != torch.float16


def chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    scale: float,
    top_k: int | None,
    query_start: int,
    starts: Tensor | None,
    segments: Tensor | None,
    landmarks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and the gate's log-sum-exp (B, H, T); arguments as checked by
    ``landmark_attention``.
    """
    groups = key.shape[1]
    split = torch.unflatten(query, 1, (groups, query.shape[1] // groups))
    call = Call(block_size, scale, top_k, query_start, starts, segments, landmarks)
    out, lse = _Chunked.apply(split, key, value, *call)  # type: ignore[no-untyped-call]
    return out.flatten(1, 2), lse.flatten(1, 2)


class _Chunked(torch.autograd.Function):
    """(B, G, R, T, D) queries on (B, G, S, D) keys and values."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        call = Call(*arguments)
        out, lse, chosen = _forward(call, query, key, value)
        ctx.call = call
        ctx.save_for_backward(query, key, value, out, lse, *chosen)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *chosen = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            grads = _backward(ctx.call, query, key, value, out, lse, chosen, grad, grad_lse)
        return (*grads, *(None for _ in ctx.call))


class _Plan:
    """How a call is cut into tiles; the same in both passes."""

    def __init__(self, call: Call, query: Tensor, key: Tensor) -> None:
        self.call = call
        self.direct = call.is_direct(query, key)
        self.exact = torch.promote_types(query.dtype, torch.float32)
        self.dtype = query.dtype if self.direct else self.exact
        self.slots = torch.arange(query.shape[3], device=query.device) + call.query_start
        self.layout = lay_out(
            key.shape[2],
            self.slots,
            block_size=call.block_size,
            starts=call.starts,
            segments=call.segments,
            landmarks=call.landmarks,
        )
        places = self.layout.slot.shape[1:].numel()
        self.gather = False
        self.per_query = query.shape[2] * places
        if call.top_k is not None:
            picked = (call.top_k + 1) * self.layout.slot.shape[2]
            cost = CPU_GATHER if query.device.type == "cpu" else GPU_GATHER
            self.gather = self.layout.owner is None and picked * cost < places
            if self.gather:
                self.per_query = query.shape[2] * (
                    picked * query.shape[4] + self.layout.mark.shape[1]
                )

    def operands(self, key: Tensor, value: Tensor) -> Operands:
        """Keys, values and landmark keys laid out as blocks."""
        layout = self.layout
        key = key.to(self.dtype)
        value = value.to(self.dtype)
        keys = as_pieces(key, layout)
        values = as_pieces(value, layout)
        marks = keys[:, :, :, -1] if layout.place is None else gather_slots(key, layout.mark)
        return Operands(keys, values, marks)

    def gradients(self, grads: Operands) -> tuple[Tensor, Tensor]:
        """Gradients of keys and values (B, G, S, D) from those of the operands."""
        layout = self.layout
        if layout.place is None:
            keys = torch.cat([grads.keys[:, :, :, :-1], grads.marks[:, :, :, None]], dim=3)
            return from_pieces(keys, layout), from_pieces(grads.values, layout)
        keys = from_pieces(grads.keys, layout) + scatter_slots(
            grads.marks, layout.mark, layout.length
        )
        return keys, from_pieces(grads.values, layout)

    def tiles(self, query: Tensor) -> Iterator[tuple[tuple[slice, slice], slice, slice]]:
        """Rows and key/value heads, queries and blocks of each tile."""
        rows, groups, _, queries, _ = query.shape
        blocks = self.layout.mark.shape[1]
        if self.direct:
            yield (slice(0, rows), slice(0, groups)), slice(0, queries), slice(0, blocks)
            return
        budget = max(1, (CPU_TILE if query.device.type == "cpu" else GPU_TILE) // self.per_query)
        step = min(queries, budget, TILE_QUERIES)
        group_step = min(groups, max(1, budget // step))
        row_step = min(rows, max(1, budget // (step * group_step)))
        spans = self._spans(
            [slice(t, min(t + step, queries)) for t in range(0, queries, step)], blocks
        )
        for row in range(0, rows, row_step):
            for group in range(0, groups, group_step):
                for span in spans:
                    yield (slice(row, row + row_step), slice(group, group + group_step)), *span

    def _spans(self, queries: list[slice], blocks: int) -> list[tuple[slice, slice]]:
        """For each slice of queries, the blocks that some of them may see."""
        layout = self.layout
        call = self.call
        if layout.owner is not None:
            return [(each, slice(0, blocks)) for each in queries]
        if call.even:
            last = [(call.query_start + each.stop - 1) // call.block_size for each in queries]
            first = [0] * len(queries)
        else:
            lowest = torch.where(layout.own < 0, blocks, layout.first).amin(dim=0)
            ends = torch.stack([lowest, layout.own.amax(dim=0)]).tolist()
            first = [min(ends[0][each]) for each in queries]
            last = [max(ends[1][each]) for each in queries]
        spans = []
        for each, low, high in zip(queries, first, last, strict=True):
            low = min(low, blocks - 1)
            spans.append((each, slice(low, max(low, min(high, blocks - 1)) + 1)))
        return spans

    def view(
        self, rows: slice, queries: slice, blocks: slice, chosen: Tensor | None, gather: bool
    ) -> View:
        """What a tile may see."""
        return view_of(
            self.layout.rows(rows), self.slots, queries, blocks, chosen, gather, self.call.scale
        )

    def cut(self, operands: Operands, heads: tuple[slice, slice], blocks: slice) -> Operands:
        """A tile's part of the operands."""
        pieces = slice(None) if self.layout.owner is not None else blocks
        keys, values, marks = operands
        return Operands(keys[(*heads, pieces)], values[(*heads, pieces)], marks[(*heads, blocks)])


def _forward(
    call: Call, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    exact = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(query)
    lse = query.new_full(query.shape[:4], -torch.inf, dtype=exact)
    choices: list[Tensor] = []
    if key.shape[2] == 0 or query.numel() == 0:
        return out, lse, choices
    plan = _Plan(call, query, key)
    operands = plan.operands(key, value)
    for heads, queries, blocks in plan.tiles(query):
        part = plan.cut(operands, heads, blocks)
        tile = query[heads][:, :, :, queries].to(plan.dtype)
        view = plan.view(heads[0], queries, blocks, None, False)
        if call.top_k is not None:
            choices.append(choose(tile, part.marks, view, call.top_k))
            view = view._replace(chosen=choices[-1], gather=plan.gather)
        tile_out, tile_lse = tile_forward(tile, part, view)
        if plan.direct:
            return tile_out, tile_lse, choices
        out[heads][:, :, :, queries] = tile_out
        lse[heads][:, :, :, queries] = tile_lse
    return out, lse, choices


def _backward(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    choices: list[Tensor],
    grad: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if key.shape[2] == 0 or query.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    plan = _Plan(call, query, key)
    operands = plan.operands(key, value)
    delta = (grad.to(plan.exact) * out.to(plan.exact)).sum(dim=-1)
    delta = delta - torch.where(lse > -torch.inf, grad_lse, 0.0)
    if plan.direct:
        view = plan.view(slice(None), slice(None), slice(None), None, False)
        d_query, sums = tile_backward(query, grad, delta, operands, view)
        return d_query, *plan.gradients(sums)
    d_query = torch.zeros_like(query)
    sums = Operands(*(torch.zeros_like(each) for each in operands))
    for number, (heads, queries, blocks) in enumerate(plan.tiles(query)):
        tile, tile_grad = (each[heads][:, :, :, queries].to(plan.dtype) for each in (query, grad))
        chosen = choices[number] if choices else None
        view = plan.view(heads[0], queries, blocks, chosen, plan.gather)
        part = plan.cut(operands, heads, blocks)
        tile_query, parts = tile_backward(
            tile, tile_grad, delta[heads][:, :, :, queries], part, view
        )
        d_query[heads][:, :, :, queries] = tile_query
        for total, addition in zip(plan.cut(sums, heads, blocks), parts, strict=True):
            total += addition
    d_key, d_value = plan.gradients(sums)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype)
