"""The choice of ``top_k``: once, by index.

A query's score of a landmark and the block's number are packed into one integer that never ties: the higher score wins,
among equals the lower block.
"""

import triton
import triton.language as tl

from landmark.ops.triton.primitives import NUMBERS, head_of, load_rows

NOTHING = tl.constexpr(-(2**63))


@triton.jit(do_not_specialize=NUMBERS)
def choice_kernel(
    p_query, p_key, p_chosen, p_start,
    query_batch, query_head, query_stride,
    key_batch, key_head, key_stride,
    n_heads, group, n_queries, n_keys, query_start, scale,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, MARKS: tl.constexpr,
    TOP_K: tl.constexpr, KEPT: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """The ``TOP_K`` past blocks of highest landmark score of each query of a tile; ``KEPT`` is a power of two."""
    n_tiles = tl.cdiv(n_queries, ROWS)
    i_query = (n_tiles - 1 - tl.program_id(0) % n_tiles) * ROWS
    i_row, i_head = tl.program_id(0) // n_tiles // n_heads, tl.program_id(0) // n_tiles % n_heads
    queries = head_of(p_query, query_batch, query_head, query_stride, i_row, i_head, False)
    keys = head_of(p_key, key_batch, key_head, key_stride, i_row, i_head // group, False)
    start = 0
    if STARTS:
        start = tl.minimum(tl.load(p_start + i_row), n_keys)
    o_query = tl.arange(0, ROWS)
    query = load_rows(queries, i_query, o_query, n_queries, ROWS, DIM, PADDED, False)
    slot = query_start + i_query + o_query - start
    n_closed = (n_keys - start) // BLOCK
    own = tl.where(slot >= 0, slot // BLOCK, 0)
    last = tl.maximum(query_start + i_query + ROWS - 1 - start, 0) // BLOCK
    best = tl.full((ROWS, KEPT), NOTHING, tl.int64)
    for first in range(0, tl.minimum(last, n_closed), MARKS):
        o_mark = tl.arange(0, MARKS).to(tl.int64) * BLOCK
        mark = load_rows(keys, start + first * BLOCK + BLOCK - 1, o_mark, n_keys, MARKS, DIM, PADDED, False)
        scores = tl.dot(query, tl.trans(mark), input_precision="ieee") * scale + 0.0  # no negative zero
        block = first + tl.arange(0, MARKS)
        past = (block[None, :] < own[:, None]) & (block < n_closed)[None, :] & (scores > float("-inf"))
        bits = scores.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        packed = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - block).to(tl.int64)[None, :]
        found = tl.topk(tl.where(past, packed, NOTHING), KEPT)
        best = tl.topk(tl.reshape(tl.join(best, found), (ROWS, 2 * KEPT)), KEPT)
    chosen = tl.where(best == NOTHING, -1, 0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
    o_kept = tl.arange(0, KEPT)
    p_chosen += ((i_row * n_heads + i_head).to(tl.int64) * n_queries + i_query) * TOP_K
    inside = (i_query + o_query < n_queries)[:, None] & (o_kept < TOP_K)[None, :]
    tl.store(p_chosen + o_query[:, None] * TOP_K + o_kept[None, :], chosen, mask=inside)
