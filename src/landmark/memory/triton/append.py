"""Kernel that appends the keys and values of a decode step, for all heads in one launch.

It does what ``Rotation.rotate`` and ``BlockStore.append`` do in plain PyTorch, for calls with one
own block in each row. Names are those of ``primitives.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark.memory.context import LayerContext
from landmark.memory.geometry import QueryGrid
from landmark.memory.triton.arguments import landmark_arguments, launch, rotation_arguments
from landmark.memory.triton.primitives import ALIGNED, STRIDES, load_queries, load_rotation
from landmark.ops.triton.configs import on_device

APPEND_WARPS = 1
# Arguments of the kernel for whose values nothing is compiled anew.
NUMBERS = (*STRIDES, "groups", "n_heads", "n_width", "n_window", "first_kept")


@triton.jit
def rotated_row(
    p_row,
    p_cos,
    p_sin,
    offset,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Returns the vector (1, PADDED) at ``p_row``, rotated by its offset inside the block.

    It is rounded as ``torch.addcmul`` rounds.
    """
    whole = tl.full((1, 1), True, tl.int1)
    vector, partner = load_queries(
        p_row + tl.zeros((1, 1), tl.int32), whole, DIM, PADDED, ROTATED, INTERLEAVED
    )
    cos, sin = load_rotation(p_cos, p_sin, offset, PADDED, ROTATED)
    return tl.fma(partner, sin, vector * cos)


@triton.jit(do_not_specialize=NUMBERS)
def append_kv_kernel(
    p_query,
    p_key,
    p_value,
    p_cos,
    p_sin,
    p_own,
    p_offset,
    p_valid,
    p_rotated,
    p_keys,
    p_values,
    p_landmark,
    query_batch,
    query_head,
    query_slot,
    key_batch,
    key_head,
    key_slot,
    value_batch,
    value_head,
    value_slot,
    store_batch,
    store_group,
    landmark_batch,
    landmark_group,
    groups,
    n_heads,
    n_width,
    n_window,
    first_kept,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SHARED: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Rotates a query by its offset inside the block, or appends a rotated key and a value.

    Rotated queries go to ``p_rotated`` (B, H, W, D). The key of a block's last slot is its
    landmark's, and with ``SHARED`` that of block 0. With ``PAGED`` the own block lies in a window
    of ``n_window`` physical blocks, otherwise at its index.
    """
    i_head = tl.program_id(0)
    i_slot = tl.program_id(1)
    i_row = tl.program_id(2).to(tl.int64)
    i_query = i_row * n_width + i_slot
    o_dim = tl.arange(0, PADDED)[None, :]
    inside = o_dim < DIM
    offset = tl.load(p_offset + i_query).to(tl.int32)
    if i_head < n_heads:
        p_row = p_query + i_row * query_batch + i_head * query_head + i_slot * query_slot
        query = rotated_row(p_row, p_cos, p_sin, offset, DIM, PADDED, ROTATED, INTERLEAVED)
        p_row = p_rotated + ((i_row * n_heads + i_head) * n_width + i_slot) * DIM
        tl.store(p_row + o_dim, query.to(p_rotated.dtype.element_ty), mask=inside)
    elif tl.load(p_valid + i_query):
        i_group = i_head - n_heads
        own = tl.load(p_own + i_row).to(tl.int32)
        index = tl.maximum(own - first_kept + 1, 0)
        physical = tl.where(own == 0, 0, 1 + own % n_window) if PAGED else index
        p_row = p_key + i_row * key_batch + i_group * key_head + i_slot * key_slot
        key = rotated_row(p_row, p_cos, p_sin, offset, DIM, PADDED, ROTATED, INTERLEAVED).to(
            p_keys.dtype.element_ty
        )
        p_row = p_value + i_row * value_batch + i_group * value_head + i_slot * value_slot
        value = tl.load(p_row + o_dim, mask=inside)
        p_landmark += tl.multiple_of(
            i_row * landmark_batch + i_group.to(tl.int64) * landmark_group, ALIGNED
        )
        closes = inside & (offset == BLOCK - 1)
        if SHARED:
            earlier = closes & (index > 0)
            key = tl.where(earlier, tl.load(p_landmark + o_dim, mask=earlier, other=0.0), key)
        tl.store(p_landmark + index.to(tl.int64) * DIM + o_dim, key, mask=closes)
        head = tl.multiple_of(i_row * store_batch + i_group.to(tl.int64) * store_group, ALIGNED)
        o_slot = head + (physical.to(tl.int64) * BLOCK + offset) * DIM + o_dim
        tl.store(p_keys + o_slot, key, mask=inside)
        tl.store(p_values + o_slot, value.to(p_values.dtype.element_ty), mask=inside)


def append(
    query: Tensor, key: Tensor, value: Tensor, grid: QueryGrid, context: LayerContext
) -> Tensor:
    """Appends the keys and values of a call of one own block in each row; seals no blocks.

    Args:
        query: ``(B, G, R, W, D)``, not rotated.
        key: ``(B, G, W, D)``, not rotated.
        value: ``(B, G, W, D)``.
        grid: where these queries stand.
        context: the layer, whose store has begun the call.

    Returns:
        the queries, rotated by their offsets inside the block, ``(B, G, R, 1, W, D)``.
    """
    store = context.store
    batch, groups, repeats, width, dim = query.shape
    heads = groups * repeats
    rotation = context.tables.offset_table(query.device, query.dtype)
    shape = (batch, groups, repeats, 1, width, dim)
    rotated = torch.empty(shape, dtype=query.dtype, device=query.device)
    query = _with_dense_columns(query.flatten(1, 2))
    key = _with_dense_columns(key)
    value = _with_dense_columns(value)
    query_batch, query_head, query_slot, _ = query.stride()
    key_batch, key_head, key_slot, _ = key.stride()
    value_batch, value_head, value_slot, _ = value.stride()
    store_batch, store_group, *_ = store.pool.keys.stride()
    with on_device(query.device):
        launch(
            append_kv_kernel,
            (heads + groups, width, batch),
            p_query=query,
            p_key=key,
            p_value=value,
            p_own=grid.own,
            p_offset=grid.offsets,
            p_valid=grid.valid,
            p_rotated=rotated,
            p_keys=store.pool.keys,
            p_values=store.pool.values,
            query_batch=query_batch,
            query_head=query_head,
            query_slot=query_slot,
            key_batch=key_batch,
            key_head=key_head,
            key_slot=key_slot,
            value_batch=value_batch,
            value_head=value_head,
            value_slot=value_slot,
            store_batch=store_batch,
            store_group=store_group,
            groups=groups,
            n_heads=heads,
            n_width=width,
            n_window=store.pool.window_size,
            first_kept=store.first,
            BLOCK=store.block_size,
            SHARED=store.shared_landmark,
            PAGED=store.pool.needs_fetch,
            num_warps=APPEND_WARPS,
            **landmark_arguments(store.landmark_keys),
            **rotation_arguments(rotation, query, context),
        )
    return rotated


def _with_dense_columns(tensor: Tensor) -> Tensor:
    """Returns the tensor, copied if the columns of a head do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
