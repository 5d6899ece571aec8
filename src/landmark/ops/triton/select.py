"""Kernel that selects ``top_k`` blocks for each query: once, by index.

A query's score of a landmark and the block's number are packed into one integer that never ties:
the higher score wins, and among equals the lower block.
"""

import triton
import triton.language as tl

from landmark.ops.triton.primitives import NUMBERS, HeadTensor, head_of, load_rows

NOTHING = tl.constexpr(-(2**63))  # below every packed score


@triton.jit
def packed(scores, number, candidate):
    """Packs scores and numbers into int64, the best one highest; ``NOTHING`` for no candidate."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)
    return tl.where(candidate & (scores > float("-inf")), order, NOTHING)


@triton.jit
def numbers_of(order, missing):
    """Returns the numbers that were packed, ``missing`` for ``NOTHING``."""
    return tl.where(order == NOTHING, missing, 0x7FFFFFFF - (order & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def merge_top_k(best, found, ROWS: tl.constexpr, KEPT: tl.constexpr):
    """Merges ``found`` (ROWS, any power of two) into the top ``KEPT``, ``best`` (ROWS, KEPT).

    The highest come first. Nothing is sorted where no row has found better than its last.
    """
    if tl.max((tl.max(found, axis=1) > tl.min(best, axis=1)).to(tl.int32), axis=0) > 0:
        best = tl.topk(tl.reshape(tl.join(best, tl.topk(found, KEPT)), (ROWS, 2 * KEPT)), KEPT)
    return best


@triton.jit
def select_in_document(
    best,
    query,
    keys,
    own_block,
    origin,
    n_blocks,
    n_keys,
    scale,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    LANDMARKS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Merges past blocks of the document that begins at slot ``origin`` into the best so far.

    They are the first ``n_blocks``, all of them finished, as far as they lie before a query's
    ``own_block`` (ROWS,).
    """
    for first in range(0, n_blocks, LANDMARKS):
        o_landmark = tl.arange(0, LANDMARKS).to(tl.int64) * BLOCK
        landmark_keys = load_rows(
            keys,
            origin + first * BLOCK + BLOCK - 1,
            o_landmark,
            n_keys,
            ROWS=LANDMARKS,
            DIM=DIM,
            PADDED=PADDED,
            TMA=False,
        )
        scores = tl.dot(query, tl.trans(landmark_keys), input_precision="ieee") * scale
        block = first + tl.arange(0, LANDMARKS)[None, :]
        past = (block < own_block[:, None]) & (block < n_blocks)
        best = merge_top_k(best, packed(scores, block, past), ROWS, KEPT)
    return best


@triton.jit(do_not_specialize=NUMBERS)
def select_blocks_kernel(
    p_query,
    p_key,
    p_selected,
    p_start,
    p_origin,
    query_batch,
    query_head,
    query_stride,
    key_batch,
    key_head,
    key_stride,
    n_heads,
    group_size,
    n_queries,
    n_keys,
    query_start,
    scale,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    LANDMARKS: tl.constexpr,
    TOP_K: tl.constexpr,
    KEPT: tl.constexpr,
    STARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Selects for a tile of queries the ``TOP_K`` past blocks of highest landmark score.

    ``KEPT`` is a power of two that holds ``TOP_K``; ``LANDMARKS`` are scored at once. With segments
    blocks are numbered from the first of their document, and a query's own document is the only one
    in which it has past blocks.
    """
    n_tiles = tl.cdiv(n_queries, ROWS)
    i_query = (n_tiles - 1 - tl.program_id(0) % n_tiles) * ROWS
    i_row = tl.program_id(0) // n_tiles // n_heads
    i_head = tl.program_id(0) // n_tiles % n_heads
    queries = head_of(
        HeadTensor(p_query, query_batch, query_head, query_stride), i_row, i_head, TMA=False
    )
    keys = head_of(
        HeadTensor(p_key, key_batch, key_head, key_stride), i_row, i_head // group_size, TMA=False
    )
    start = 0
    if STARTS:
        start = tl.minimum(tl.load(p_start + i_row), n_keys)
    o_query = tl.arange(0, ROWS)
    query = load_rows(
        queries, i_query, o_query, n_queries, ROWS=ROWS, DIM=DIM, PADDED=PADDED, TMA=False
    )
    first = query_start + i_query
    best = tl.full((ROWS, KEPT), NOTHING, tl.int64)
    if SEGMENTS:
        o_slot = first + o_query
        end = tl.minimum(first + ROWS, n_keys)
        while end > tl.maximum(first, start):
            origin = tl.load(p_origin + i_row.to(tl.int64) * n_keys + end - 1)
            inside = (o_slot >= origin) & (o_slot < end)
            best = select_in_document(
                best,
                query,
                keys,
                own_block=tl.where(inside, (o_slot - origin) // BLOCK, 0),
                origin=origin,
                n_blocks=(end - 1 - origin) // BLOCK,
                n_keys=n_keys,
                scale=scale,
                BLOCK=BLOCK,
                DIM=DIM,
                PADDED=PADDED,
                ROWS=ROWS,
                LANDMARKS=LANDMARKS,
                KEPT=KEPT,
            )
            end = origin
    else:
        slot = first + o_query - start
        last = tl.maximum(first + ROWS - 1 - start, 0) // BLOCK
        best = select_in_document(
            best,
            query,
            keys,
            own_block=tl.where(slot >= 0, slot // BLOCK, 0),
            origin=start,
            n_blocks=tl.minimum(last, (n_keys - start) // BLOCK),
            n_keys=n_keys,
            scale=scale,
            BLOCK=BLOCK,
            DIM=DIM,
            PADDED=PADDED,
            ROWS=ROWS,
            LANDMARKS=LANDMARKS,
            KEPT=KEPT,
        )
    o_kept = tl.arange(0, KEPT)
    p_selected += ((i_row * n_heads + i_head).to(tl.int64) * n_queries + i_query) * TOP_K
    inside = (i_query + o_query < n_queries)[:, None] & (o_kept < TOP_K)[None, :]
    p_rows = p_selected + o_query[:, None] * TOP_K + o_kept[None, :]
    tl.store(p_rows, numbers_of(best, -1), mask=inside)
