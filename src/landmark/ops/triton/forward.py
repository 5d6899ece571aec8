"""The forward pass: one program for each tile of queries, an online softmax over the blocks that it
sees.
"""

import triton
import triton.language as tl

from landmark.ops.triton.primitives import (
    LN_2,
    LOWEST,
    NUMBERS,
    gate_logit,
    gate_mass,
    head_of,
    load_choice,
    load_keys,
    load_rows,
    relation,
    store_rows,
    text_scores,
    text_share,
    visible,
)


@triton.jit
def block_scores(
    query,
    keys,
    slot,
    origin,
    block,
    n_keys,
    factor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    TMA: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Peak and total of the text, and landmark's score, (ROWS, 1) each, of a block that is read in
    pieces.
    """
    peak = tl.full((ROWS, 1), LOWEST, tl.float32)
    total = tl.zeros((ROWS, 1), tl.float32)
    mark = tl.zeros((ROWS, 1), tl.float32)
    for piece in range(0, PIECES):
        key = load_keys(
            keys, origin, block, piece, n_keys, BLOCK, DIM, PADDED, 1, WIDTH, TMA, CLEAR
        )
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        text, here = text_scores(scores, slot, block, piece, n_keys, BLOCK, ROWS, 1, WIDTH, CLEAR)
        higher = tl.maximum(peak, tl.max(text, axis=2) * factor)
        total = total * tl.exp2(peak - higher) + tl.sum(
            tl.exp2(text * factor - higher[:, :, None]), axis=2
        )
        peak = higher
        mark += here
    return peak, total, mark


@triton.jit
def clear_peak(
    query,
    marks,
    origin,
    n_clear,
    factor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    MARKS: tl.constexpr,
):
    """Highest logit (ROWS,) of the first ``n_clear`` blocks, past blocks of all queries: landmarks
    alone say it.
    """
    peak = tl.full((ROWS,), LOWEST, tl.float32)
    for block in range(0, n_clear, MARKS):
        o_mark = (
            tl.minimum(tl.arange(0, MARKS), n_clear - 1 - block) * BLOCK
        )  # the last one again and again
        mark = load_rows(
            marks, origin + block * BLOCK + BLOCK - 1, o_mark, 0, MARKS, DIM, PADDED, False, True
        )
        peak = tl.maximum(
            peak, tl.max(tl.dot(query, tl.trans(mark), input_precision="ieee"), axis=1)
        )
    return peak * factor


@triton.jit
def raise_peak(state, peak):
    """The state under a higher running maximum."""
    out, gate_peak, gate_total = state
    higher = tl.maximum(gate_peak, peak)
    shrink = tl.exp2(gate_peak - higher)
    return out * shrink[:, None], higher, gate_total * shrink


@triton.jit
def attend_tile(
    state,
    query,
    chosen,
    keys,
    values,
    slot,
    own,
    origin,
    block,
    n_keys,
    n_closed,
    factor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    TOP_K: tl.constexpr,
    TMA: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Adds the blocks from ``block`` on to ``state``: output (ROWS, PADDED), peak and total (ROWS,)
    of the gate.

    Where all are past blocks of all queries, the peak must be theirs already.
    """
    if PIECES == 1:
        key = load_keys(
            keys, origin, block, 0, n_keys, BLOCK, DIM, PADDED, BLOCKS, WIDTH, TMA, CLEAR
        )
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        text, mark = text_scores(scores, slot, block, 0, n_keys, BLOCK, ROWS, BLOCKS, WIDTH, CLEAR)
        peak = tl.maximum(tl.max(text, axis=2) * factor, LOWEST)
        exponent = tl.exp2(text * factor - peak[:, :, None])
        total = tl.sum(exponent, axis=2)
    else:
        peak, total, mark = block_scores(
            query,
            keys,
            slot,
            origin,
            block,
            n_keys,
            factor,
            BLOCK,
            DIM,
            PADDED,
            ROWS,
            WIDTH,
            PIECES,
            TMA,
            CLEAR,
        )
    past, is_own = relation(block, own, chosen, n_closed, BLOCKS, TOP_K)
    ALL: tl.constexpr = CLEAR and TOP_K == 0
    logit = gate_logit(peak, total, mark * factor, past, is_own, ALL)
    if not ALL:
        state = raise_peak(state, tl.max(logit, axis=1))
    out, gate_peak, gate_total = state
    gate = tl.exp2(logit - gate_peak[:, None])
    gate_total += tl.sum(gate_mass(gate, total, past, ALL), axis=1)
    share = text_share(gate, total, past, ALL)
    for piece in range(0, PIECES):
        if PIECES > 1:
            key = load_keys(
                keys, origin, block, piece, n_keys, BLOCK, DIM, PADDED, BLOCKS, WIDTH, TMA, CLEAR
            )
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            text, _ = text_scores(
                scores, slot, block, piece, n_keys, BLOCK, ROWS, BLOCKS, WIDTH, CLEAR
            )
            exponent = tl.exp2(text * factor - peak[:, :, None])
        weights = tl.reshape(exponent * share[:, :, None], (ROWS, BLOCKS * WIDTH))
        value = load_keys(
            values, origin, block, piece, n_keys, BLOCK, DIM, PADDED, BLOCKS, WIDTH, TMA, CLEAR
        )
        out = tl.dot(weights.to(value.dtype), value, out, input_precision="ieee")
    return out, gate_peak, gate_total


@triton.jit
def attend_document(
    state,
    query,
    chosen,
    p_listed,
    n_listed,
    keys,
    values,
    marks,
    first,
    o_slot,
    origin,
    end,
    n_keys,
    factor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    TOP_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Adds what the queries see of the document from ``origin`` to ``end``: their own blocks, then
    past blocks.

    With ``TOP_K`` the past blocks are those that some query of the tile chose, ``n_listed`` of them
    at ``p_listed``.
    """
    slot, own, n_keys, n_closed, n_clear, n_seen = visible(
        first, o_slot, origin, end, n_keys, BLOCK, ROWS, BLOCKS
    )
    for block in range(n_clear, n_seen, BLOCKS):
        state = attend_tile(
            state,
            query,
            chosen,
            keys,
            values,
            slot,
            own,
            origin,
            block,
            n_keys,
            n_closed,
            factor,
            BLOCK,
            DIM,
            PADDED,
            ROWS,
            BLOCKS,
            WIDTH,
            PIECES,
            TOP_K,
            TMA,
            False,
        )
    if TOP_K > 0:
        for i_listed in range(0, n_listed):
            block = tl.load(p_listed + i_listed)
            state = attend_tile(
                state,
                query,
                chosen,
                keys,
                values,
                slot,
                own,
                origin,
                block,
                n_keys,
                n_closed,
                factor,
                BLOCK,
                DIM,
                PADDED,
                ROWS,
                BLOCKS,
                WIDTH,
                PIECES,
                TOP_K,
                TMA,
                True,
            )
    else:
        peak = clear_peak(query, marks, origin, n_clear, factor, BLOCK, DIM, PADDED, ROWS, 64)
        state = raise_peak(state, peak)
        for block in range(0, n_clear, BLOCKS):
            state = attend_tile(
                state,
                query,
                chosen,
                keys,
                values,
                slot,
                own,
                origin,
                block,
                n_keys,
                n_closed,
                factor,
                BLOCK,
                DIM,
                PADDED,
                ROWS,
                BLOCKS,
                WIDTH,
                PIECES,
                TOP_K,
                TMA,
                True,
            )
    return state


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    p_query,
    p_key,
    p_value,
    p_mark,
    p_out,
    p_lse,
    p_start,
    p_origin,
    p_chosen,
    p_listed,
    p_counts,
    listed_stride,
    query_batch,
    query_head,
    query_stride,
    key_batch,
    key_head,
    key_stride,
    value_batch,
    value_head,
    value_stride,
    out_batch,
    out_head,
    out_stride,
    n_heads,
    group,
    n_queries,
    n_keys,
    query_start,
    factor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    STARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TOP_K: tl.constexpr,
    KEPT: tl.constexpr,
    TMA: tl.constexpr,
):
    """Output and log-sum-exp of a tile of queries; of a head's tiles those that see most come
    first.
    """
    n_tiles = tl.cdiv(n_queries, ROWS)
    i_query = (n_tiles - 1 - tl.program_id(0) % n_tiles) * ROWS
    i_row = tl.program_id(0) // n_tiles // n_heads
    i_head = tl.program_id(0) // n_tiles % n_heads
    keys = head_of(p_key, key_batch, key_head, key_stride, i_row, i_head // group, TMA)
    values = head_of(p_value, value_batch, value_head, value_stride, i_row, i_head // group, TMA)
    marks = head_of(p_mark, key_batch, key_head, key_stride, i_row, i_head // group, False)
    queries = head_of(p_query, query_batch, query_head, query_stride, i_row, i_head, False)
    outs = head_of(p_out, out_batch, out_head, out_stride, i_row, i_head, False)

    o_query = tl.arange(0, ROWS)
    query = load_rows(queries, i_query, o_query, n_queries, ROWS, DIM, PADDED, False)
    first = query_start + i_query
    start = 0
    if STARTS:
        start = tl.minimum(tl.load(p_start + i_row), n_keys)
    state = (
        tl.zeros((ROWS, PADDED), tl.float32),
        tl.full((ROWS,), LOWEST, tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )
    if SEGMENTS:
        end = tl.minimum(first + ROWS, n_keys)
        while end > tl.maximum(first, start):
            origin = tl.load(p_origin + i_row.to(tl.int64) * n_keys + end - 1)
            state = attend_document(
                state,
                query,
                0,
                0,
                0,
                keys,
                values,
                marks,
                first,
                first + o_query,
                origin,
                end,
                n_keys,
                factor,
                BLOCK,
                DIM,
                PADDED,
                ROWS,
                BLOCKS,
                WIDTH,
                PIECES,
                0,
                TMA,
            )
            end = origin
    else:
        n_listed = 0
        if TOP_K > 0:
            i_tile = (i_row * n_heads + i_head) * n_tiles + i_query // ROWS
            n_listed = tl.load(p_counts + i_tile)
            p_listed += i_tile.to(tl.int64) * listed_stride
        chosen = load_choice(
            p_chosen, i_row * n_heads + i_head, n_queries, i_query, o_query, TOP_K, KEPT
        )
        state = attend_document(
            state,
            query,
            chosen,
            p_listed,
            n_listed,
            keys,
            values,
            marks,
            first,
            first + o_query,
            start,
            first + ROWS + n_keys,
            n_keys,
            factor,
            BLOCK,
            DIM,
            PADDED,
            ROWS,
            BLOCKS,
            WIDTH,
            PIECES,
            TOP_K,
            TMA,
        )
    out, peak, total = state
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    store_rows(outs, i_query, o_query, n_queries, out * (1 / total)[:, None], DIM, PADDED)
    lse = tl.where(seen, (peak + tl.log2(total)) * LN_2, float("-inf"))
    p_lse += (i_row * n_heads + i_head).to(tl.int64) * n_queries + i_query
    tl.store(p_lse + o_query, lse, mask=i_query + o_query < n_queries)
