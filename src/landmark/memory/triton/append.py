"""One kernel that files a call of few queries: a token is filed, scored and read in three launches
for all heads.

It does what ``Rotation.rotate`` and ``BlockStore.write`` do in plain PyTorch, for calls with one
own block in each row. Names are those of ``kernels.py``.
"""

import triton
import triton.language as tl

from landmark.memory.triton.prefill import ALIGNED, STRIDES, load_queries, load_turn

# Arguments of the kernel for whose values nothing is compiled anew.
NUMBERS = (*STRIDES, "groups", "n_heads", "n_width", "n_ring", "first_stored")


@triton.jit
def turned(
    p_row,
    p_cos,
    p_sin,
    offset,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The vector (1, PADDED) at ``p_row``, turned to a place inside the block and rounded as
    ``addcmul`` rounds.
    """
    whole = tl.full((1, 1), True, tl.int1)
    vector, partner = load_queries(
        p_row + tl.zeros((1, 1), tl.int32), whole, DIM, PADDED, TURNED, PAIRS
    )
    cos, sin = load_turn(p_cos, p_sin, offset, PADDED, TURNED)
    return tl.fma(partner, sin, vector * cos)


@triton.jit(do_not_specialize=NUMBERS)
def file_kernel(
    p_query,
    p_key,
    p_value,
    p_cos,
    p_sin,
    p_own,
    p_offset,
    p_valid,
    p_turned,
    p_keys,
    p_values,
    p_mark,
    query_batch,
    query_head,
    query_place,
    key_batch,
    key_head,
    key_place,
    value_batch,
    value_head,
    value_place,
    store_batch,
    store_group,
    mark_batch,
    mark_group,
    groups,
    n_heads,
    n_width,
    n_ring,
    first_stored,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    SHARED: tl.constexpr,
    FETCHED: tl.constexpr,
):
    """Turns a query to its place inside the block, ``p_turned`` (B, H, W, D); or files a key,
    turned, and a value.

    The key of a block's last slot is its landmark's, and with ``SHARED`` that of block 0. With
    ``FETCHED`` the own block stands in a ring of ``n_ring`` frames, otherwise at its place.
    """
    i_head = tl.program_id(0)
    i_place = tl.program_id(1)
    i_row = tl.program_id(2).to(tl.int64)
    i_query = i_row * n_width + i_place
    o_dim = tl.arange(0, PADDED)[None, :]
    inside = o_dim < DIM
    offset = tl.load(p_offset + i_query).to(tl.int32)
    if i_head < n_heads:
        p_row = p_query + i_row * query_batch + i_head * query_head + i_place * query_place
        query = turned(p_row, p_cos, p_sin, offset, DIM, PADDED, TURNED, PAIRS)
        p_row = p_turned + ((i_row * n_heads + i_head) * n_width + i_place) * DIM
        tl.store(p_row + o_dim, query.to(p_turned.dtype.element_ty), mask=inside)
    elif tl.load(p_valid + i_query):
        i_group = i_head - n_heads
        own = tl.load(p_own + i_row).to(tl.int32)
        place = tl.maximum(own - first_stored + 1, 0)
        frame = tl.where(own == 0, 0, 1 + own % n_ring) if FETCHED else place
        p_row = p_key + i_row * key_batch + i_group * key_head + i_place * key_place
        key = turned(p_row, p_cos, p_sin, offset, DIM, PADDED, TURNED, PAIRS).to(
            p_keys.dtype.element_ty
        )
        p_row = p_value + i_row * value_batch + i_group * value_head + i_place * value_place
        value = tl.load(p_row + o_dim, mask=inside)
        p_mark += tl.multiple_of(i_row * mark_batch + i_group.to(tl.int64) * mark_group, ALIGNED)
        closes = inside & (offset == BLOCK - 1)
        if SHARED:
            earlier = closes & (place > 0)
            key = tl.where(earlier, tl.load(p_mark + o_dim, mask=earlier, other=0.0), key)
        tl.store(p_mark + place.to(tl.int64) * DIM + o_dim, key, mask=closes)
        head = tl.multiple_of(i_row * store_batch + i_group.to(tl.int64) * store_group, ALIGNED)
        o_slot = head + (frame.to(tl.int64) * BLOCK + offset) * DIM + o_dim
        tl.store(p_keys + o_slot, key, mask=inside)
        tl.store(p_values + o_slot, value.to(p_values.dtype.element_ty), mask=inside)
