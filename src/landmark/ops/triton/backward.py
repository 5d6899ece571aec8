"""The backward pass: gradients of the queries by tiles of queries, those of keys and values by
tiles of keys.

Both compute a tile's scores again. No two programs add to the same numbers, so that results are the
same bit for bit in every run. The first kernel also leaves ``delta`` for the second.
"""

import triton
import triton.language as tl

from landmark.ops.triton.primitives import (
    LOG2_E,
    LOWEST,
    NUMBERS,
    gate_logit,
    head_of,
    key_places,
    load_choice,
    load_keys,
    load_rows,
    relation,
    score_gradient,
    store_rows,
    text_scores,
    text_share,
    visible,
)


@triton.jit
def tile_products(
    query,
    grad,
    key,
    value,
    slot,
    block,
    piece,
    n_keys,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Scores of text (ROWS, BLOCKS, WIDTH) and landmarks, and products of the gradient with the
    values.
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    products = tl.dot(grad, tl.trans(value), input_precision="ieee")
    text, mark = text_scores(scores, slot, block, piece, n_keys, BLOCK, ROWS, BLOCKS, WIDTH, CLEAR)
    return text, mark, tl.reshape(products, (ROWS, BLOCKS, WIDTH))


@triton.jit
def block_products(
    query,
    grad,
    keys,
    values,
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
    """Peak, total, weighted products and landmark's score, (ROWS, 1) each, of a block that is read
    in pieces.
    """
    peak = tl.full((ROWS, 1), LOWEST, tl.float32)
    total = tl.zeros((ROWS, 1), tl.float32)
    weighted = tl.zeros((ROWS, 1), tl.float32)
    mark = tl.zeros((ROWS, 1), tl.float32)
    for piece in range(0, PIECES):
        key = load_keys(
            keys, origin, block, piece, n_keys, BLOCK, DIM, PADDED, 1, WIDTH, TMA, CLEAR
        )
        value = load_keys(
            values, origin, block, piece, n_keys, BLOCK, DIM, PADDED, 1, WIDTH, TMA, CLEAR
        )
        text, here, products = tile_products(
            query, grad, key, value, slot, block, piece, n_keys, BLOCK, ROWS, 1, WIDTH, CLEAR
        )
        higher = tl.maximum(peak, tl.max(text, axis=2) * factor)
        exponent = tl.exp2(text * factor - higher[:, :, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(exponent, axis=2)
        weighted = weighted * shrink + tl.sum(exponent * products, axis=2)
        peak = higher
        mark += here
    return peak, total, weighted, mark


@triton.jit
def tile_gradient(
    query,
    grad,
    lse,
    delta,
    chosen,
    key,
    value,
    whole,
    slot,
    own,
    block,
    piece,
    n_keys,
    n_closed,
    factor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    TOP_K: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Weights of a tile's text, and derivatives of its scaled scores, (ROWS, BLOCKS * WIDTH) each.

    ``whole`` is what ``block_products`` gave, where blocks are read in pieces.
    """
    text, mark, products = tile_products(
        query, grad, key, value, slot, block, piece, n_keys, BLOCK, ROWS, BLOCKS, WIDTH, CLEAR
    )
    if PIECES == 1:
        peak = tl.maximum(tl.max(text, axis=2) * factor, LOWEST)
        exponent = tl.exp2(text * factor - peak[:, :, None])
        total = tl.sum(exponent, axis=2)
        weighted = tl.sum(exponent * products, axis=2)
    else:
        peak, total, weighted, mark = whole
        exponent = tl.exp2(text * factor - peak[:, :, None])
    past, is_own = relation(block, own, chosen, n_closed, BLOCKS, TOP_K)
    ALL: tl.constexpr = CLEAR and TOP_K == 0
    gate = tl.exp2(gate_logit(peak, total, mark * factor, past, is_own, ALL) - lse[:, None])
    share = text_share(gate, total, past, ALL)
    mean = weighted / tl.maximum(total, 1.0)
    gradient = score_gradient(
        exponent, products, share, gate, mean, past, delta, piece, BLOCK, WIDTH, ALL
    )
    weights = exponent * share[:, :, None]
    return tl.reshape(weights, (ROWS, BLOCKS * WIDTH)), tl.reshape(gradient, (ROWS, BLOCKS * WIDTH))


@triton.jit
def query_tile(
    d_query,
    query,
    grad,
    lse,
    delta,
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
    """Adds what the blocks from ``block`` on bring to the gradient of the queries."""
    whole = 0
    if PIECES > 1:
        whole = block_products(
            query,
            grad,
            keys,
            values,
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
    for piece in range(0, PIECES):
        key = load_keys(
            keys, origin, block, piece, n_keys, BLOCK, DIM, PADDED, BLOCKS, WIDTH, TMA, CLEAR
        )
        value = load_keys(
            values, origin, block, piece, n_keys, BLOCK, DIM, PADDED, BLOCKS, WIDTH, TMA, CLEAR
        )
        _, gradient = tile_gradient(
            query,
            grad,
            lse,
            delta,
            chosen,
            key,
            value,
            whole,
            slot,
            own,
            block,
            piece,
            n_keys,
            n_closed,
            factor,
            BLOCK,
            ROWS,
            BLOCKS,
            WIDTH,
            PIECES,
            TOP_K,
            CLEAR,
        )
        d_query = tl.dot(gradient.to(key.dtype), key, d_query, input_precision="ieee")
    return d_query


@triton.jit
def query_document(
    d_query,
    query,
    grad,
    lse,
    delta,
    chosen,
    p_listed,
    n_listed,
    keys,
    values,
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
    """Adds what the document from ``origin`` to ``end`` brings, visited as ``attend_document``
    does.
    """
    slot, own, n_keys, n_closed, n_clear, n_seen = visible(
        first, o_slot, origin, end, n_keys, BLOCK, ROWS, BLOCKS
    )
    for block in range(n_clear, n_seen, BLOCKS):
        d_query = query_tile(
            d_query,
            query,
            grad,
            lse,
            delta,
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
            d_query = query_tile(
                d_query,
                query,
                grad,
                lse,
                delta,
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
        for block in range(0, n_clear, BLOCKS):
            d_query = query_tile(
                d_query,
                query,
                grad,
                lse,
                delta,
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
    return d_query


@triton.jit(do_not_specialize=NUMBERS)
def query_gradient_kernel(
    p_query,
    p_key,
    p_value,
    p_out,
    p_lse,
    p_grad,
    p_lse_grad,
    p_delta,
    p_d_query,
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
    grad_batch,
    grad_head,
    grad_stride,
    d_query_batch,
    d_query_head,
    d_query_stride,
    n_heads,
    group,
    n_queries,
    n_keys,
    query_start,
    scale,
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
    """Gradient of a tile of queries; also ``delta``: product of gradient and output, less the
    gradient of ``lse``.
    """
    n_tiles = tl.cdiv(n_queries, ROWS)
    i_query = (n_tiles - 1 - tl.program_id(0) % n_tiles) * ROWS
    i_row = tl.program_id(0) // n_tiles // n_heads
    i_head = tl.program_id(0) // n_tiles % n_heads
    keys = head_of(p_key, key_batch, key_head, key_stride, i_row, i_head // group, TMA)
    values = head_of(p_value, value_batch, value_head, value_stride, i_row, i_head // group, TMA)
    queries = head_of(p_query, query_batch, query_head, query_stride, i_row, i_head, False)
    outs = head_of(p_out, out_batch, out_head, out_stride, i_row, i_head, False)
    grads = head_of(p_grad, grad_batch, grad_head, grad_stride, i_row, i_head, False)
    d_queries = head_of(
        p_d_query, d_query_batch, d_query_head, d_query_stride, i_row, i_head, False
    )

    o_query = tl.arange(0, ROWS)
    query = load_rows(queries, i_query, o_query, n_queries, ROWS, DIM, PADDED, False)
    grad = load_rows(grads, i_query, o_query, n_queries, ROWS, DIM, PADDED, False)
    out = load_rows(outs, i_query, o_query, n_queries, ROWS, DIM, PADDED, False)
    o_sums = (i_row * n_heads + i_head).to(tl.int64) * n_queries + i_query + o_query
    inside = i_query + o_query < n_queries
    lse = tl.load(p_lse + o_sums, mask=inside, other=float("-inf"))
    unseen = lse == float("-inf")
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    delta -= tl.where(unseen, 0.0, tl.load(p_lse_grad + o_sums, mask=inside, other=0.0))
    tl.store(p_delta + o_sums, delta, mask=inside)
    lse = tl.where(unseen, float("inf"), lse * LOG2_E)

    first = query_start + i_query
    start = 0
    if STARTS:
        start = tl.minimum(tl.load(p_start + i_row), n_keys)
    d_query = tl.zeros((ROWS, PADDED), tl.float32)
    if SEGMENTS:
        end = tl.minimum(first + ROWS, n_keys)
        while end > tl.maximum(first, start):
            origin = tl.load(p_origin + i_row.to(tl.int64) * n_keys + end - 1)
            d_query = query_document(
                d_query,
                query,
                grad,
                lse,
                delta,
                0,
                0,
                0,
                keys,
                values,
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
        d_query = query_document(
            d_query,
            query,
            grad,
            lse,
            delta,
            chosen,
            p_listed,
            n_listed,
            keys,
            values,
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
    store_rows(d_queries, i_query, o_query, n_queries, d_query * scale, DIM, PADDED)


@triton.jit
def key_value_tile(
    d_key,
    d_value,
    key,
    value,
    keys,
    values,
    queries,
    grads,
    p_lse,
    p_delta,
    p_chosen,
    i_head,
    i_query,
    n_queries,
    n_seeing,
    origin,
    query_start,
    block,
    piece,
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
    KEPT: tl.constexpr,
    TMA: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Adds what the queries from ``i_query`` on bring to the gradients of a tile of keys and
    values.
    """
    o_query = tl.arange(0, ROWS)
    query = load_rows(queries, i_query, o_query, n_seeing, ROWS, DIM, PADDED, TMA)
    grad = load_rows(grads, i_query, o_query, n_seeing, ROWS, DIM, PADDED, TMA)
    chosen = load_choice(p_chosen, i_head, n_queries, i_query, o_query, TOP_K, KEPT)
    inside = i_query + o_query < n_seeing
    lse = tl.load(p_lse + i_query + o_query, mask=inside, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    delta = tl.load(p_delta + i_query + o_query, mask=inside, other=0.0)
    slot = query_start + i_query + o_query - origin
    own = slot // BLOCK
    whole = 0
    if PIECES > 1:
        whole = block_products(
            query,
            grad,
            keys,
            values,
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
            False,
            CLEAR,
        )
    weights, gradient = tile_gradient(
        query,
        grad,
        lse,
        delta,
        chosen,
        key,
        value,
        whole,
        slot,
        own,
        block,
        piece,
        n_keys,
        n_closed,
        factor,
        BLOCK,
        ROWS,
        BLOCKS,
        WIDTH,
        PIECES,
        TOP_K,
        CLEAR,
    )
    d_value = tl.dot(tl.trans(weights.to(grad.dtype)), grad, d_value, input_precision="ieee")
    d_key = tl.dot(tl.trans(gradient.to(query.dtype)), query, d_key, input_precision="ieee")
    return d_key, d_value


@triton.jit
def key_value_blocks(
    keys,
    values,
    d_keys,
    d_values,
    query,
    grad,
    p_lse,
    p_delta,
    p_chosen,
    p_tiles,
    p_borders,
    tiles_stride,
    n_blocks,
    i_row,
    i_head,
    n_heads,
    origin,
    end,
    block,
    piece,
    group,
    n_queries,
    n_keys,
    query_start,
    scale,
    factor,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    TOP_K: tl.constexpr,
    KEPT: tl.constexpr,
    TMA: tl.constexpr,
):
    """Gradients of a tile of keys and values in the document from ``origin`` to ``end``, over a
    group's query heads.

    ``query`` and ``grad`` are tensors with their strides, as ``head_of`` takes them. With ``TOP_K``
    tiles of queries begin at multiples of ``ROWS``; those that have the block in their past and
    chose it are listed at ``p_tiles``.
    """
    n_keys = tl.minimum(n_keys, end) - origin
    n_closed = n_keys // BLOCK
    n_seeing = tl.minimum(n_queries, end - query_start)
    key = load_keys(
        keys, origin, block, piece, n_keys, BLOCK, DIM, PADDED, BLOCKS, WIDTH, False, False
    )
    value = load_keys(
        values, origin, block, piece, n_keys, BLOCK, DIM, PADDED, BLOCKS, WIDTH, False, False
    )
    d_key = tl.zeros((BLOCKS * WIDTH, PADDED), tl.float32)
    d_value = tl.zeros((BLOCKS * WIDTH, PADDED), tl.float32)
    first = query_start - origin
    begin = tl.maximum(block * BLOCK - first, 0)
    clear = n_seeing
    if block + BLOCKS <= n_closed:
        clear = tl.minimum((block + BLOCKS) * BLOCK - first, n_seeing)
    if TOP_K > 0:
        begin = begin // ROWS * ROWS
    clear = begin + tl.cdiv(tl.maximum(clear - begin, 0), ROWS) * ROWS
    for i_member in range(0, group):
        queries = head_of(query[0], query[1], query[2], query[3], i_row, i_head + i_member, TMA)
        grads = head_of(grad[0], grad[1], grad[2], grad[3], i_row, i_head + i_member, TMA)
        i_member_head = i_row * n_heads + i_head + i_member
        for i_query in range(begin, tl.minimum(clear, n_seeing), ROWS):
            d_key, d_value = key_value_tile(
                d_key,
                d_value,
                key,
                value,
                keys,
                values,
                queries,
                grads,
                p_lse,
                p_delta,
                p_chosen,
                i_member_head,
                i_query,
                n_queries,
                n_seeing,
                origin,
                query_start,
                block,
                piece,
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
                KEPT,
                TMA,
                False,
            )
        if TOP_K > 0:
            p_border = p_borders + i_member_head.to(tl.int64) * (n_blocks + 1) + block
            p_tile = p_tiles + i_member_head.to(tl.int64) * tiles_stride
            for i_tile in range(tl.load(p_border), tl.load(p_border + 1)):
                i_query = tl.load(p_tile + i_tile) * ROWS
                d_key, d_value = key_value_tile(
                    d_key,
                    d_value,
                    key,
                    value,
                    keys,
                    values,
                    queries,
                    grads,
                    p_lse,
                    p_delta,
                    p_chosen,
                    i_member_head,
                    i_query,
                    n_queries,
                    n_seeing,
                    origin,
                    query_start,
                    block,
                    piece,
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
                    KEPT,
                    TMA,
                    True,
                )
        else:
            for i_query in range(clear, n_seeing, ROWS):
                d_key, d_value = key_value_tile(
                    d_key,
                    d_value,
                    key,
                    value,
                    keys,
                    values,
                    queries,
                    grads,
                    p_lse,
                    p_delta,
                    p_chosen,
                    i_member_head,
                    i_query,
                    n_queries,
                    n_seeing,
                    origin,
                    query_start,
                    block,
                    piece,
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
                    KEPT,
                    TMA,
                    True,
                )
        p_lse += n_queries
        p_delta += n_queries
    o_key = key_places(piece, BLOCK, BLOCKS, WIDTH)
    store_rows(d_keys, origin + block * BLOCK, o_key, origin + n_keys, d_key * scale, DIM, PADDED)
    store_rows(d_values, origin + block * BLOCK, o_key, origin + n_keys, d_value, DIM, PADDED)


@triton.jit(do_not_specialize=NUMBERS)
def key_value_gradient_kernel(
    p_query,
    p_key,
    p_value,
    p_lse,
    p_grad,
    p_delta,
    p_d_key,
    p_d_value,
    p_start,
    p_origin,
    p_end,
    p_chosen,
    p_tiles,
    p_borders,
    tiles_stride,
    query_batch,
    query_head,
    query_stride,
    key_batch,
    key_head,
    key_stride,
    value_batch,
    value_head,
    value_stride,
    grad_batch,
    grad_head,
    grad_stride,
    d_key_batch,
    d_key_head,
    d_key_stride,
    d_value_batch,
    d_value_head,
    d_value_stride,
    n_heads,
    group,
    n_queries,
    n_keys,
    query_start,
    scale,
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
    """Gradients of a tile of keys and values; with segments, of the blocks that begin in a window
    of the row.
    """
    n_tiles = tl.cdiv(n_keys, BLOCKS * BLOCK) * PIECES
    i_tile = tl.program_id(0) % n_tiles
    i_group = tl.program_id(0) // n_tiles
    i_row = i_group // (n_heads // group)
    i_group = i_group % (n_heads // group)
    i_head = i_group * group
    keys = head_of(p_key, key_batch, key_head, key_stride, i_row, i_group, False)
    values = head_of(p_value, value_batch, value_head, value_stride, i_row, i_group, False)
    d_keys = head_of(p_d_key, d_key_batch, d_key_head, d_key_stride, i_row, i_group, False)
    d_values = head_of(
        p_d_value, d_value_batch, d_value_head, d_value_stride, i_row, i_group, False
    )
    query = (p_query, query_batch, query_head, query_stride)
    grad = (p_grad, grad_batch, grad_head, grad_stride)
    p_lse += (i_row * n_heads + i_head).to(tl.int64) * n_queries
    p_delta += (i_row * n_heads + i_head).to(tl.int64) * n_queries
    start = 0
    if STARTS:
        start = tl.minimum(tl.load(p_start + i_row), n_keys)
    block = i_tile // PIECES * BLOCKS
    piece = i_tile % PIECES
    if SEGMENTS:
        p_origin += i_row.to(tl.int64) * n_keys
        p_end += i_row.to(tl.int64) * n_keys
        i_key = tl.maximum(block * BLOCK, start)
        stop = tl.minimum((block + 1) * BLOCK, n_keys)
        if i_key < stop:
            place = (i_key - tl.load(p_origin + i_key)) % BLOCK
            if place > 0:
                i_key = tl.minimum(i_key + BLOCK - place, tl.load(p_end + i_key))
        while i_key < stop:
            origin = tl.load(p_origin + i_key)
            end = tl.load(p_end + i_key)
            key_value_blocks(
                keys,
                values,
                d_keys,
                d_values,
                query,
                grad,
                p_lse,
                p_delta,
                0,
                0,
                0,
                0,
                0,
                i_row,
                i_head,
                n_heads,
                origin,
                end,
                (i_key - origin) // BLOCK,
                piece,
                group,
                n_queries,
                n_keys,
                query_start,
                scale,
                factor,
                BLOCK,
                DIM,
                PADDED,
                ROWS,
                BLOCKS,
                WIDTH,
                PIECES,
                0,
                0,
                TMA,
            )
            i_key = tl.minimum(i_key + BLOCK, end)
    else:
        key_value_blocks(
            keys,
            values,
            d_keys,
            d_values,
            query,
            grad,
            p_lse,
            p_delta,
            p_chosen,
            p_tiles,
            p_borders,
            tiles_stride,
            tl.cdiv(n_keys, BLOCK),
            i_row,
            i_head,
            n_heads,
            start,
            n_keys + n_queries + query_start,
            block,
            piece,
            group,
            n_queries,
            n_keys,
            query_start,
            scale,
            factor,
            BLOCK,
            DIM,
            PADDED,
            ROWS,
            BLOCKS,
            WIDTH,
            PIECES,
            TOP_K,
            KEPT,
            TMA,
        )
