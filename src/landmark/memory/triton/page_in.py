"""Kernels that page blocks in from host memory, so that a decode step never waits for the CPU.

One program of ``lru_lookup_kernel`` for each row and key/value head does what ``BlockTable`` does
in plain PyTorch: it looks up which selected blocks are on the device, and gives the others the
physical blocks that were used longest ago. ``page_in_kernel`` then copies those from host memory,
by address.

A *row head* is a row and key/value head. It *wants* the blocks that its queries selected. A work
item is a block that a query reads. Other names are those of ``primitives.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark.memory.context import LayerContext
from landmark.memory.geometry import QueryGrid
from landmark.memory.storage.cached_pool import MOST_LRU_BLOCKS
from landmark.memory.triton.arguments import WARPS, launch
from landmark.memory.triton.primitives import ALIGNED
from landmark.ops.triton.configs import on_device, power_of_two

OLDEST = tl.constexpr(2**20)  # greatest age that is told apart
LRU_SLOTS = tl.constexpr(MOST_LRU_BLOCKS)  # of a row head, at most: a power of two
BITS = tl.constexpr(MOST_LRU_BLOCKS.bit_length())  # that number a slot, or a wanted block
LAST = tl.constexpr(2**63 - 1)
# Arguments of the kernels for whose values nothing is compiled anew.
NUMBERS = (
    "groups",
    "n_wanted",
    "n_items",
    "n_lru",
    "n_window",
    "n_local_items",
    "n_rows",
    "n_extent",
    "first_kept",
    "store_head",
)


@triton.jit
def higher_of(one, other):
    """For a running maximum."""
    return tl.maximum(one, other)


@triton.jit(do_not_specialize=NUMBERS)
def lru_lookup_kernel(
    p_selected,
    p_own,
    p_window,
    p_lru,
    p_last_used,
    p_stats,
    p_physical,
    p_missing,
    groups,
    n_wanted,
    n_items,
    n_lru,
    n_window,
    n_local_items,
    first_kept,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Gives the work items of a row head their physical blocks.

    ``p_physical`` (row heads, queries, n_items) gets them. ``p_missing`` (row heads, n_wanted) gets
    the physical block of each block that has to be copied, once for each such block, else -1. The
    slots of the LRU cache and the wanted blocks are sorted together by block, ``SIZE`` at most: a
    wanted block comes right behind the slot that holds it, and equal blocks stand side by side.
    """
    i_row_head = tl.program_id(0).to(tl.int64)
    o_each = tl.arange(0, SIZE)
    i_row = i_row_head // groups
    o_lru = o_each - n_wanted
    p_lru = p_lru + i_row_head * n_lru
    p_last_used = p_last_used + i_row_head * n_lru
    p_missing = p_missing + i_row_head * n_wanted
    p_physical += i_row_head * (n_wanted // TOP_K) * n_items
    inside = o_each < n_wanted
    is_lru = (o_lru >= 0) & (o_lru < n_lru)
    index = tl.load(p_selected + i_row_head * n_wanted + o_each, mask=inside, other=-1).to(tl.int32)
    block = tl.where(index <= 0, 0, index + first_kept - 1)
    held = tl.load(p_window + i_row * n_window + block % n_window).to(tl.int32)
    is_older = (index > 0) & (held != block)
    physical = tl.where(block == 0, 0, 1 + block % n_window)
    tl.store(
        p_physical + (o_each // TOP_K) * n_items + o_each % TOP_K,
        physical,
        mask=inside & (is_older == 0),
    )
    tl.store(p_missing + o_each, -1, mask=inside & (is_older == 0))

    now = tl.max(tl.load(p_last_used + o_lru, mask=is_lru, other=0), axis=0) + 1
    block = tl.where(is_older, block, tl.load(p_lru + o_lru, mask=is_lru, other=0))
    order = tl.where(
        is_older | is_lru, (block << BITS) + tl.where(is_older, LRU_SLOTS + o_each, o_lru), LAST
    )
    order = tl.sort(order)
    block = order >> BITS
    entry = (order & (2 * LRU_SLOTS - 1)).to(tl.int32)
    is_lru = entry < LRU_SLOTS
    wanted = (entry >= LRU_SLOTS) & (order != LAST)
    behind = tl.gather(tl.where(wanted, block, -2), tl.minimum(o_each + 1, SIZE - 1), 0)
    before = tl.where(o_each == 0, -2, tl.gather(block, tl.maximum(o_each - 1, 0), 0))
    is_hit = is_lru & (behind == block)
    latest = tl.associative_scan(tl.where(is_lru, order, -LAST), 0, higher_of)
    at = tl.where(latest >> BITS == block, (latest & (2 * LRU_SLOTS - 1)).to(tl.int32), -1)
    missing = wanted & (at < 0)
    is_first = missing & (before != block)

    age = tl.minimum(now - tl.load(p_last_used + entry, mask=is_lru, other=0), OLDEST).to(tl.int32)
    spare = tl.where(is_lru & (is_hit == 0), age * LRU_SLOTS + LRU_SLOTS - 1 - entry, -1)
    order_of_miss = tl.maximum(tl.cumsum(is_first.to(tl.int32), axis=0) - 1, 0)
    given = LRU_SLOTS - 1 - tl.gather(tl.sort(spare, descending=True), order_of_miss, 0) % LRU_SLOTS
    at = tl.where(missing, given, at)
    tl.debug_barrier()
    tl.store(p_lru + at, block, mask=is_first)
    tl.store(p_last_used + at, now + tl.zeros((SIZE,), tl.int64), mask=wanted)
    o_wanted = entry - LRU_SLOTS
    physical = 1 + n_window + at
    tl.store(p_missing + o_wanted, tl.where(is_first, physical, -1), mask=wanted)
    tl.store(p_physical + (o_wanted // TOP_K) * n_items + o_wanted % TOP_K, physical, mask=wanted)

    own = tl.load(p_own + i_row).to(tl.int32)
    for i_local in range(n_local_items):
        local_index = tl.maximum(own - i_local, 0)
        local_index = tl.where(local_index == 0, 0, 1 + local_index % n_window) + tl.zeros(
            (SIZE,), tl.int32
        )
        tl.store(
            p_physical + o_each * n_items + TOP_K + i_local,
            local_index,
            mask=o_each < n_wanted // TOP_K,
        )
    fetched = tl.sum(is_first.to(tl.int64), axis=0)
    tl.atomic_add(p_stats, tl.sum(is_hit.to(tl.int64), axis=0))
    tl.atomic_add(p_stats + 1, fetched)
    tl.atomic_add(p_stats + 2, fetched)


@triton.jit(do_not_specialize=NUMBERS)
def page_in_kernel(
    p_selected,
    p_missing,
    p_pointer,
    p_keys,
    p_values,
    groups,
    n_wanted,
    n_rows,
    n_extent,
    first_kept,
    store_head,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copies the keys, or the values, of one missing block, ``SIZE`` numbers, to its physical
    block.

    ``p_pointer`` (extents, n_rows, 2): where the first of ``n_extent`` blocks begins, and bytes
    from one to the next.
    """
    i_half = tl.program_id(0) % 2
    i_entry = (tl.program_id(0) // 2).to(tl.int64)
    physical = tl.load(p_missing + i_entry)
    if physical >= 0:
        i_row_head = i_entry // n_wanted
        block = tl.load(p_selected + i_entry).to(tl.int32) + first_kept - 1
        p_extent = (
            p_pointer + ((block // n_extent).to(tl.int64) * n_rows + i_row_head // groups) * 2
        )
        begin = tl.load(p_extent)
        step = tl.load(p_extent + 1)
        bytes_of_one = p_keys.dtype.element_ty.primitive_bitwidth // 8
        begin += (block % n_extent) * step + (i_row_head % groups * 2 + i_half) * (
            SIZE * bytes_of_one
        )
        p_from = tl.multiple_of(begin, 16).to(tl.pointer_type(p_keys.dtype.element_ty))
        p_to = p_keys if i_half == 0 else p_values
        p_to += tl.multiple_of(i_row_head * store_head + physical.to(tl.int64) * SIZE, ALIGNED)
        o_number = tl.arange(0, WIDTH)
        data = tl.load(p_from + o_number, mask=o_number < SIZE)
        tl.store(p_to + o_number, data, mask=o_number < SIZE)


@dataclass(frozen=True)
class PagedItems:
    """Where the work items of a decode step lie.

    Attributes:
        physical: ``(B, G, R, 1, W, items)`` int32 physical block of each item: the selected blocks,
            then the own block, then the blocks before it.
        missing: ``(B, G, R, 1, W, K)`` int32 physical block of each block that was copied, else -1.
    """

    physical: Tensor
    missing: Tensor


def page_in(grid: QueryGrid, selected: Tensor, context: LayerContext) -> PagedItems | None:
    """Brings selected blocks to the device without asking the CPU.

    Args:
        grid: one own block in each row.
        selected: ``(B, G, R, 1, W, K)`` int32 indices of selected blocks, -1 for none.
        context: the layer, whose blocks are offloaded.

    Returns:
        ``None`` where some blocks lie on disk, or do not fit the LRU cache together.
    """
    arguments = context.store.pool.page_in_arguments()
    batch, groups, *_, top_k = selected.shape
    wanted = selected[0, 0].numel()
    if arguments is None or wanted > arguments.lru_size:
        return None
    local_items = 1 + grid.local.shape[-1]
    items = top_k + local_items
    physical = selected.new_empty((*selected.shape[:5], items))
    missing = torch.empty_like(selected)
    keys = context.store.pool.keys
    size = keys[0, 0, 0].numel()
    first_kept = context.store.first
    with on_device(selected.device):
        launch(
            lru_lookup_kernel,
            (batch * groups,),
            p_selected=selected,
            p_own=grid.own,
            p_window=arguments.window,
            p_lru=arguments.lru,
            p_last_used=arguments.last_used,
            p_stats=arguments.stats,
            p_physical=physical,
            p_missing=missing,
            groups=groups,
            n_wanted=wanted,
            n_items=items,
            n_lru=arguments.lru_size,
            n_window=context.store.pool.window_size,
            n_local_items=local_items,
            first_kept=first_kept,
            TOP_K=top_k,
            SIZE=power_of_two(wanted + arguments.lru_size),
            num_warps=WARPS,
        )
        launch(
            page_in_kernel,
            (2 * missing.numel(),),
            p_selected=selected,
            p_missing=missing,
            p_pointer=arguments.pointers,
            p_keys=keys,
            p_values=context.store.pool.values,
            groups=groups,
            n_wanted=wanted,
            n_rows=batch,
            n_extent=arguments.extent_blocks,
            first_kept=first_kept,
            store_head=keys.stride(1),
            SIZE=size,
            WIDTH=power_of_two(size),
            num_warps=WARPS,
        )
    return PagedItems(physical, missing)
