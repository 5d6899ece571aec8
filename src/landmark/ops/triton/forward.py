"""Forward kernel: an online softmax over blocks, one program for each tile of queries."""

import triton
import triton.language as tl

from landmark.ops.triton.primitives import (
    LN_2,
    LOWEST,
    NUMBERS,
    HeadTensor,
    ListedBlocks,
    Queries,
    TileShape,
    gate_logit,
    gate_mass,
    head_of,
    load_keys,
    load_rows,
    load_selected,
    relation,
    store_rows,
    text_scores,
    text_share,
    visible,
)

LANDMARKS = tl.constexpr(64)  # of which scores are computed at once


@triton.jit
def block_scores(
    queries, keys, document, block, factor, shape, TMA: tl.constexpr, CLEAR: tl.constexpr
):
    """Reads a block in pieces; returns peak and total of its text, and its landmark's score.

    Each is (ROWS, 1).
    """
    peak = tl.full((shape.ROWS, 1), LOWEST, tl.float32)
    total = tl.zeros((shape.ROWS, 1), tl.float32)
    landmark = tl.zeros((shape.ROWS, 1), tl.float32)
    for piece in range(0, shape.PIECES):
        key = load_keys(keys, document, block, piece, shape=shape, TMA=TMA, CLEAR=CLEAR)
        scores = tl.dot(queries.query, tl.trans(key), input_precision="ieee")
        text, here = text_scores(
            scores, queries.slot, block, piece, n_keys=document.n_keys, shape=shape, CLEAR=CLEAR
        )
        higher = tl.maximum(peak, tl.max(text, axis=2) * factor)
        total = total * tl.exp2(peak - higher) + tl.sum(
            tl.exp2(text * factor - higher[:, :, None]), axis=2
        )
        peak = higher
        landmark += here
    return peak, total, landmark


@triton.jit
def clear_peak(query, landmark_keys, origin, n_clear, factor, shape):
    """Returns the highest logit (ROWS,) of the first ``n_clear`` blocks.

    They are past blocks of all queries, so their landmarks alone say it.
    """
    peak = tl.full((shape.ROWS,), LOWEST, tl.float32)
    for block in range(0, n_clear, LANDMARKS):
        # Behind the last block its landmark is read again and again.
        o_landmark = tl.minimum(tl.arange(0, LANDMARKS), n_clear - 1 - block) * shape.BLOCK
        landmarks = load_rows(
            landmark_keys,
            origin + block * shape.BLOCK + shape.BLOCK - 1,
            o_landmark,
            0,
            ROWS=LANDMARKS,
            DIM=shape.DIM,
            PADDED=shape.PADDED,
            TMA=False,
            WHOLE=True,
        )
        scores = tl.dot(query, tl.trans(landmarks), input_precision="ieee")
        peak = tl.maximum(peak, tl.max(scores, axis=1))
    return peak * factor


@triton.jit
def raise_peak(state, peak):
    """Returns the state under a running maximum that is at least ``peak``."""
    out, gate_peak, gate_total = state
    higher = tl.maximum(gate_peak, peak)
    shrink = tl.exp2(gate_peak - higher)
    return out * shrink[:, None], higher, gate_total * shrink


@triton.jit
def attend_tile(
    state,
    queries,
    keys,
    values,
    document,
    block,
    factor,
    shape,
    TMA: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Adds the blocks of one tile of keys, from ``block`` on, to the state.

    The state is the output (ROWS, PADDED), and peak and total (ROWS,) of the gate. With ``CLEAR``
    and without ``TOP_K`` the peak must already be that of all past blocks.
    """
    if shape.PIECES == 1:
        key = load_keys(keys, document, block, 0, shape=shape, TMA=TMA, CLEAR=CLEAR)
        scores = tl.dot(queries.query, tl.trans(key), input_precision="ieee")
        text, landmark = text_scores(
            scores, queries.slot, block, 0, n_keys=document.n_keys, shape=shape, CLEAR=CLEAR
        )
        peak = tl.maximum(tl.max(text, axis=2) * factor, LOWEST)
        exponent = tl.exp2(text * factor - peak[:, :, None])
        total = tl.sum(exponent, axis=2)
    else:
        peak, total, landmark = block_scores(
            queries, keys, document, block, factor=factor, shape=shape, TMA=TMA, CLEAR=CLEAR
        )
    past, own = relation(block, queries.own_block, queries.selected, document.n_closed, shape=shape)
    ALL: tl.constexpr = CLEAR and shape.TOP_K == 0
    logit = gate_logit(peak, total, landmark * factor, past, own=own, CLEAR=ALL)
    if not ALL:
        state = raise_peak(state, tl.max(logit, axis=1))
    out, gate_peak, gate_total = state
    gate = tl.exp2(logit - gate_peak[:, None])
    gate_total += tl.sum(gate_mass(gate, total, past, CLEAR=ALL), axis=1)
    share = text_share(gate, total, past, CLEAR=ALL)
    for piece in range(0, shape.PIECES):
        if shape.PIECES > 1:
            key = load_keys(keys, document, block, piece, shape=shape, TMA=TMA, CLEAR=CLEAR)
            scores = tl.dot(queries.query, tl.trans(key), input_precision="ieee")
            text, _ = text_scores(
                scores, queries.slot, block, piece, n_keys=document.n_keys, shape=shape, CLEAR=CLEAR
            )
            exponent = tl.exp2(text * factor - peak[:, :, None])
        weights = tl.reshape(exponent * share[:, :, None], (shape.ROWS, shape.BLOCKS * shape.WIDTH))
        value = load_keys(values, document, block, piece, shape=shape, TMA=TMA, CLEAR=CLEAR)
        out = tl.dot(weights.to(value.dtype), value, out, input_precision="ieee")
    return out, gate_peak, gate_total


@triton.jit
def attend_document(
    state,
    query,
    selected,
    listed,
    keys,
    values,
    landmark_keys,
    first,
    o_slot,
    origin,
    end,
    n_keys,
    factor,
    shape,
    TMA: tl.constexpr,
):
    """Adds what the queries see of the document from ``origin`` to ``end`` to the state.

    Their own blocks come first, then past blocks. With ``TOP_K`` the past blocks are those of
    ``listed``, which some query of the tile selected.
    """
    slot, own_block, document, n_clear, n_seen = visible(
        first, o_slot, origin, end, n_keys=n_keys, shape=shape
    )
    queries = Queries(query=query, slot=slot, own_block=own_block, selected=selected)
    for block in range(n_clear, n_seen, shape.BLOCKS):
        state = attend_tile(
            state,
            queries,
            keys,
            values,
            document=document,
            block=block,
            factor=factor,
            shape=shape,
            TMA=TMA,
            CLEAR=False,
        )
    if shape.TOP_K > 0:
        for i_listed in range(0, listed.n_blocks):
            block = tl.load(listed.p_blocks + i_listed)
            state = attend_tile(
                state,
                queries,
                keys,
                values,
                document=document,
                block=block,
                factor=factor,
                shape=shape,
                TMA=TMA,
                CLEAR=True,
            )
    else:
        peak = clear_peak(query, landmark_keys, origin, n_clear, factor=factor, shape=shape)
        state = raise_peak(state, peak)
        for block in range(0, n_clear, shape.BLOCKS):
            state = attend_tile(
                state,
                queries,
                keys,
                values,
                document=document,
                block=block,
                factor=factor,
                shape=shape,
                TMA=TMA,
                CLEAR=True,
            )
    return state


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    p_query,
    p_key,
    p_value,
    p_landmark_key,
    p_out,
    p_lse,
    p_start,
    p_origin,
    p_selected,
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
    group_size,
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
    """Computes output and log-sum-exp of a tile of queries.

    Of a head's tiles those that see most come first. ``p_key`` and ``p_value`` are descriptors with
    ``TMA``; ``p_landmark_key`` is always the pointer to the keys.
    """
    n_tiles = tl.cdiv(n_queries, ROWS)
    i_query = (n_tiles - 1 - tl.program_id(0) % n_tiles) * ROWS
    i_row = tl.program_id(0) // n_tiles // n_heads
    i_head = tl.program_id(0) // n_tiles % n_heads
    i_group = i_head // group_size
    keys = head_of(HeadTensor(p_key, key_batch, key_head, key_stride), i_row, i_group, TMA=TMA)
    values = head_of(
        HeadTensor(p_value, value_batch, value_head, value_stride), i_row, i_group, TMA=TMA
    )
    landmark_keys = head_of(
        HeadTensor(p_landmark_key, key_batch, key_head, key_stride), i_row, i_group, TMA=False
    )
    queries = head_of(
        HeadTensor(p_query, query_batch, query_head, query_stride), i_row, i_head, TMA=False
    )
    outs = head_of(HeadTensor(p_out, out_batch, out_head, out_stride), i_row, i_head, TMA=False)

    o_query = tl.arange(0, ROWS)
    query = load_rows(
        queries, i_query, o_query, n_queries, ROWS=ROWS, DIM=DIM, PADDED=PADDED, TMA=False
    )
    first = query_start + i_query
    start = 0
    if STARTS:
        start = tl.minimum(tl.load(p_start + i_row), n_keys)
    state = (
        tl.zeros((ROWS, PADDED), tl.float32),
        tl.full((ROWS,), LOWEST, tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )
    n_listed = 0
    if TOP_K > 0:
        i_tile = (i_row * n_heads + i_head) * n_tiles + i_query // ROWS
        n_listed = tl.load(p_counts + i_tile)
        p_listed += i_tile.to(tl.int64) * listed_stride
    selected = load_selected(
        p_selected,
        i_row * n_heads + i_head,
        n_queries,
        i_query,
        o_row=o_query,
        TOP_K=TOP_K,
        KEPT=KEPT,
    )
    if SEGMENTS:
        end = tl.minimum(first + ROWS, n_keys)
        while end > tl.maximum(first, start):
            origin = tl.load(p_origin + i_row.to(tl.int64) * n_keys + end - 1)
            state = attend_document(
                state,
                query,
                selected=selected,
                listed=ListedBlocks(
                    p_blocks=p_listed, n_blocks=tl.where(origin <= first, n_listed, 0)
                ),
                keys=keys,
                values=values,
                landmark_keys=landmark_keys,
                first=first,
                o_slot=first + o_query,
                origin=origin,
                end=end,
                n_keys=n_keys,
                factor=factor,
                shape=TileShape(BLOCK, DIM, PADDED, ROWS, BLOCKS, WIDTH, PIECES, TOP_K, KEPT),
                TMA=TMA,
            )
            end = origin
    else:
        state = attend_document(
            state,
            query,
            selected=selected,
            listed=ListedBlocks(p_blocks=p_listed, n_blocks=n_listed),
            keys=keys,
            values=values,
            landmark_keys=landmark_keys,
            first=first,
            o_slot=first + o_query,
            origin=start,
            end=first + ROWS + n_keys,
            n_keys=n_keys,
            factor=factor,
            shape=TileShape(BLOCK, DIM, PADDED, ROWS, BLOCKS, WIDTH, PIECES, TOP_K, KEPT),
            TMA=TMA,
        )
    out, peak, total = state
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    store_rows(
        outs,
        i_query,
        o_query,
        n_queries,
        rows=out * (1 / total)[:, None],
        DIM=DIM,
        PADDED=PADDED,
    )
    lse = tl.where(seen, (peak + tl.log2(total)) * LN_2, float("-inf"))
    p_lse += (i_row * n_heads + i_head).to(tl.int64) * n_queries + i_query
    tl.store(p_lse + o_query, lse, mask=i_query + o_query < n_queries)
