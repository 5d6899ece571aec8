"""Backward kernels: one for the gradient of queries, one for those of keys and values.

The first has a program for each tile of queries, the second one for each tile of keys. Both compute
a tile's scores again. No two programs add to the same numbers, so results are the same bit for bit
in every run. The first kernel also leaves ``delta`` for the second.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from landmark.ops.triton.primitives import (
    LOG2_E,
    LOWEST,
    NUMBERS,
    HeadTensor,
    ListedBlocks,
    PackedDocument,
    Queries,
    TileShape,
    gate_logit,
    head_of,
    key_offsets,
    load_keys,
    load_rows,
    load_selected,
    relation,
    score_gradient,
    store_rows,
    text_scores,
    text_share,
    visible,
)


class Gradients(NamedTuple):
    """What the forward pass and its caller left for a tile of queries.

    Attributes:
        grad: (ROWS, PADDED) gradient of the output.
        lse: (ROWS,) log-sum-exp of the gate in units of log2, ``inf`` where nothing is seen.
        delta: (ROWS,) product of gradient and output, less the gradient of the log-sum-exp.
    """

    grad: Any
    lse: Any
    delta: Any


class SumPointers(NamedTuple):
    """Pointers to numbers of each query (B, H, T), moved to one head.

    Attributes:
        p_lse: log-sum-exp of the gate.
        p_delta: as in ``Gradients``.
    """

    p_lse: Any
    p_delta: Any


class ListedTiles(NamedTuple):
    """Pointers to the lists of ``BlockLists`` by block, of all rows and heads.

    Attributes:
        p_tiles: tiles of queries, those of one block side by side.
        p_indptr: where in ``p_tiles`` those of each block begin.
        tiles_stride: distance between the tiles of two heads.
        n_blocks: blocks of a row.
        i_block: number in the lists of the block that is computed.
    """

    p_tiles: Any
    p_indptr: Any
    tiles_stride: Any
    n_blocks: Any
    i_block: Any


@triton.jit
def tile_products(queries, grad, key, value, block, piece, n_keys, shape, CLEAR: tl.constexpr):
    """Returns scores of text and landmarks, and products of the gradient with the values.

    (ROWS, BLOCKS, WIDTH), and (ROWS, BLOCKS) for landmarks.
    """
    scores = tl.dot(queries.query, tl.trans(key), input_precision="ieee")
    products = tl.dot(grad, tl.trans(value), input_precision="ieee")
    text, landmark = text_scores(
        scores, queries.slot, block, piece, n_keys=n_keys, shape=shape, CLEAR=CLEAR
    )
    return text, landmark, tl.reshape(products, (shape.ROWS, shape.BLOCKS, shape.WIDTH))


@triton.jit
def block_products(
    queries,
    grad,
    keys,
    values,
    document,
    block,
    factor,
    shape,
    TMA: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Reads a block in pieces; returns its sums, (ROWS, 1) each.

    They are peak and total of the text, its weighted products, and the landmark's score.
    """
    peak = tl.full((shape.ROWS, 1), LOWEST, tl.float32)
    total = tl.zeros((shape.ROWS, 1), tl.float32)
    weighted = tl.zeros((shape.ROWS, 1), tl.float32)
    landmark = tl.zeros((shape.ROWS, 1), tl.float32)
    for piece in range(0, shape.PIECES):
        key = load_keys(keys, document, block, piece, shape=shape, TMA=TMA, CLEAR=CLEAR)
        value = load_keys(values, document, block, piece, shape=shape, TMA=TMA, CLEAR=CLEAR)
        text, here, products = tile_products(
            queries,
            grad,
            key,
            value,
            block=block,
            piece=piece,
            n_keys=document.n_keys,
            shape=shape,
            CLEAR=CLEAR,
        )
        higher = tl.maximum(peak, tl.max(text, axis=2) * factor)
        exponent = tl.exp2(text * factor - higher[:, :, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(exponent, axis=2)
        weighted = weighted * shrink + tl.sum(exponent * products, axis=2)
        peak = higher
        landmark += here
    return peak, total, weighted, landmark


@triton.jit
def tile_gradient(
    queries,
    gradients,
    key,
    value,
    whole,
    document,
    block,
    piece,
    factor,
    shape,
    CLEAR: tl.constexpr,
):
    """Returns weights of a tile's text, and derivatives of its scaled scores.

    Both are (ROWS, BLOCKS * WIDTH). ``whole`` is the result of ``block_products`` where blocks are
    read in pieces.
    """
    text, landmark, products = tile_products(
        queries,
        gradients.grad,
        key,
        value,
        block=block,
        piece=piece,
        n_keys=document.n_keys,
        shape=shape,
        CLEAR=CLEAR,
    )
    if shape.PIECES == 1:
        peak = tl.maximum(tl.max(text, axis=2) * factor, LOWEST)
        exponent = tl.exp2(text * factor - peak[:, :, None])
        total = tl.sum(exponent, axis=2)
        weighted = tl.sum(exponent * products, axis=2)
    else:
        peak, total, weighted, landmark = whole
        exponent = tl.exp2(text * factor - peak[:, :, None])
    past, own = relation(block, queries.own_block, queries.selected, document.n_closed, shape=shape)
    ALL: tl.constexpr = CLEAR and shape.TOP_K == 0
    logit = gate_logit(peak, total, landmark * factor, past, own=own, CLEAR=ALL)
    gate = tl.exp2(logit - gradients.lse[:, None])
    share = text_share(gate, total, past, CLEAR=ALL)
    mean = weighted / tl.maximum(total, 1.0)
    gradient = score_gradient(
        exponent,
        products,
        share,
        gate,
        mean=mean,
        past=past,
        delta=gradients.delta,
        piece=piece,
        BLOCK=shape.BLOCK,
        WIDTH=shape.WIDTH,
        CLEAR=ALL,
    )
    weights = exponent * share[:, :, None]
    columns: tl.constexpr = shape.BLOCKS * shape.WIDTH
    return (
        tl.reshape(weights, (shape.ROWS, columns)),
        tl.reshape(gradient, (shape.ROWS, columns)),
    )


@triton.jit
def query_tile(
    d_query,
    queries,
    gradients,
    keys,
    values,
    document,
    block,
    factor,
    shape,
    TMA: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Adds what one tile of keys, from ``block`` on, brings to the gradient of the queries."""
    whole = 0
    if shape.PIECES > 1:
        whole = block_products(
            queries,
            gradients.grad,
            keys,
            values,
            document=document,
            block=block,
            factor=factor,
            shape=shape,
            TMA=TMA,
            CLEAR=CLEAR,
        )
    for piece in range(0, shape.PIECES):
        key = load_keys(keys, document, block, piece, shape=shape, TMA=TMA, CLEAR=CLEAR)
        value = load_keys(values, document, block, piece, shape=shape, TMA=TMA, CLEAR=CLEAR)
        _, gradient = tile_gradient(
            queries,
            gradients,
            key,
            value,
            whole=whole,
            document=document,
            block=block,
            piece=piece,
            factor=factor,
            shape=shape,
            CLEAR=CLEAR,
        )
        d_query = tl.dot(gradient.to(key.dtype), key, d_query, input_precision="ieee")
    return d_query


@triton.jit
def query_document(
    d_query,
    query,
    gradients,
    selected,
    listed,
    keys,
    values,
    first,
    o_slot,
    origin,
    end,
    n_keys,
    factor,
    shape,
    TMA: tl.constexpr,
):
    """Adds what the document from ``origin`` to ``end`` brings to the gradient of the queries.

    It is visited as ``attend_document`` does.
    """
    slot, own_block, document, n_clear, n_seen = visible(
        first, o_slot, origin, end, n_keys=n_keys, shape=shape
    )
    queries = Queries(query=query, slot=slot, own_block=own_block, selected=selected)
    for block in range(n_clear, n_seen, shape.BLOCKS):
        d_query = query_tile(
            d_query,
            queries,
            gradients,
            keys,
            values=values,
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
            d_query = query_tile(
                d_query,
                queries,
                gradients,
                keys,
                values=values,
                document=document,
                block=block,
                factor=factor,
                shape=shape,
                TMA=TMA,
                CLEAR=True,
            )
    else:
        for block in range(0, n_clear, shape.BLOCKS):
            d_query = query_tile(
                d_query,
                queries,
                gradients,
                keys,
                values=values,
                document=document,
                block=block,
                factor=factor,
                shape=shape,
                TMA=TMA,
                CLEAR=True,
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
    grad_batch,
    grad_head,
    grad_stride,
    d_query_batch,
    d_query_head,
    d_query_stride,
    n_heads,
    group_size,
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
    """Computes the gradient of a tile of queries, and its ``delta`` (see ``Gradients``)."""
    n_tiles = tl.cdiv(n_queries, ROWS)
    i_query = (n_tiles - 1 - tl.program_id(0) % n_tiles) * ROWS
    i_row = tl.program_id(0) // n_tiles // n_heads
    i_head = tl.program_id(0) // n_tiles % n_heads
    i_group = i_head // group_size
    keys = head_of(HeadTensor(p_key, key_batch, key_head, key_stride), i_row, i_group, TMA=TMA)
    values = head_of(
        HeadTensor(p_value, value_batch, value_head, value_stride), i_row, i_group, TMA=TMA
    )
    queries = head_of(
        HeadTensor(p_query, query_batch, query_head, query_stride), i_row, i_head, TMA=False
    )
    outs = head_of(HeadTensor(p_out, out_batch, out_head, out_stride), i_row, i_head, TMA=False)
    grads = head_of(
        HeadTensor(p_grad, grad_batch, grad_head, grad_stride), i_row, i_head, TMA=False
    )
    d_queries = head_of(
        HeadTensor(p_d_query, d_query_batch, d_query_head, d_query_stride), i_row, i_head, TMA=False
    )

    o_query = tl.arange(0, ROWS)
    query = load_rows(
        queries, i_query, o_query, n_queries, ROWS=ROWS, DIM=DIM, PADDED=PADDED, TMA=False
    )
    grad = load_rows(
        grads, i_query, o_query, n_queries, ROWS=ROWS, DIM=DIM, PADDED=PADDED, TMA=False
    )
    out = load_rows(outs, i_query, o_query, n_queries, ROWS=ROWS, DIM=DIM, PADDED=PADDED, TMA=False)
    o_sums = (i_row * n_heads + i_head).to(tl.int64) * n_queries + i_query + o_query
    inside = i_query + o_query < n_queries
    lse = tl.load(p_lse + o_sums, mask=inside, other=float("-inf"))
    unseen = lse == float("-inf")
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    delta -= tl.where(unseen, 0.0, tl.load(p_lse_grad + o_sums, mask=inside, other=0.0))
    tl.store(p_delta + o_sums, delta, mask=inside)
    lse = tl.where(unseen, float("inf"), lse * LOG2_E)
    gradients = Gradients(grad=grad, lse=lse, delta=delta)

    first = query_start + i_query
    start = 0
    if STARTS:
        start = tl.minimum(tl.load(p_start + i_row), n_keys)
    d_query = tl.zeros((ROWS, PADDED), tl.float32)
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
            d_query = query_document(
                d_query,
                query,
                gradients,
                selected=selected,
                listed=ListedBlocks(
                    p_blocks=p_listed, n_blocks=tl.where(origin <= first, n_listed, 0)
                ),
                keys=keys,
                values=values,
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
        d_query = query_document(
            d_query,
            query,
            gradients,
            selected=selected,
            listed=ListedBlocks(p_blocks=p_listed, n_blocks=n_listed),
            keys=keys,
            values=values,
            first=first,
            o_slot=first + o_query,
            origin=start,
            end=first + ROWS + n_keys,
            n_keys=n_keys,
            factor=factor,
            shape=TileShape(BLOCK, DIM, PADDED, ROWS, BLOCKS, WIDTH, PIECES, TOP_K, KEPT),
            TMA=TMA,
        )
    store_rows(d_queries, i_query, o_query, n_queries, rows=d_query * scale, DIM=DIM, PADDED=PADDED)


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
    sums,
    p_selected,
    i_head,
    i_query,
    n_queries,
    n_seeing,
    query_start,
    document,
    block,
    piece,
    factor,
    shape,
    TMA: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Adds what the queries from ``i_query`` on bring to the gradients of keys and values."""
    o_query = tl.arange(0, shape.ROWS)
    query = load_rows(
        queries,
        i_query,
        o_query,
        n_seeing,
        ROWS=shape.ROWS,
        DIM=shape.DIM,
        PADDED=shape.PADDED,
        TMA=TMA,
    )
    grad = load_rows(
        grads,
        i_query,
        o_query,
        n_seeing,
        ROWS=shape.ROWS,
        DIM=shape.DIM,
        PADDED=shape.PADDED,
        TMA=TMA,
    )
    selected = load_selected(
        p_selected,
        i_head,
        n_queries,
        i_query,
        o_row=o_query,
        TOP_K=shape.TOP_K,
        KEPT=shape.KEPT,
    )
    inside = i_query + o_query < n_seeing
    lse = tl.load(sums.p_lse + i_query + o_query, mask=inside, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    delta = tl.load(sums.p_delta + i_query + o_query, mask=inside, other=0.0)
    slot = query_start + i_query + o_query - document.origin
    tile = Queries(query=query, slot=slot, own_block=slot // shape.BLOCK, selected=selected)
    whole = 0
    if shape.PIECES > 1:
        whole = block_products(
            tile,
            grad,
            keys,
            values,
            document=document,
            block=block,
            factor=factor,
            shape=shape,
            TMA=False,
            CLEAR=CLEAR,
        )
    weights, gradient = tile_gradient(
        tile,
        Gradients(grad=grad, lse=lse, delta=delta),
        key,
        value,
        whole=whole,
        document=document,
        block=block,
        piece=piece,
        factor=factor,
        shape=shape,
        CLEAR=CLEAR,
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
    sums,
    p_selected,
    listed,
    i_row,
    i_head,
    n_heads,
    group_size,
    origin,
    end,
    block,
    piece,
    n_queries,
    n_keys,
    query_start,
    scale,
    factor,
    shape,
    SEGMENTS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Computes the gradients of a tile of keys and values in one document.

    The document lies from slot ``origin`` to ``end``. The gradients are sums over the query heads
    of a group, the first of which is ``i_head``. ``query`` and ``grad`` are each a ``HeadTensor``.
    With ``TOP_K`` tiles of queries begin at multiples of ``ROWS``; ``listed`` has those that have
    the block in their past and selected it.
    """
    n_keys = tl.minimum(n_keys, end) - origin
    document = PackedDocument(origin=origin, n_keys=n_keys, n_closed=n_keys // shape.BLOCK)
    n_seeing = tl.minimum(n_queries, end - query_start)
    key = load_keys(keys, document, block, piece, shape=shape, TMA=False, CLEAR=False)
    value = load_keys(values, document, block, piece, shape=shape, TMA=False, CLEAR=False)
    d_key = tl.zeros((shape.BLOCKS * shape.WIDTH, shape.PADDED), tl.float32)
    d_value = tl.zeros((shape.BLOCKS * shape.WIDTH, shape.PADDED), tl.float32)
    first = query_start - origin
    begin = tl.maximum(block * shape.BLOCK - first, 0)
    clear = n_seeing
    if block + shape.BLOCKS <= document.n_closed:
        clear = tl.minimum((block + shape.BLOCKS) * shape.BLOCK - first, n_seeing)
    if shape.TOP_K > 0:
        begin = begin // shape.ROWS * shape.ROWS
    clear = begin + tl.cdiv(tl.maximum(clear - begin, 0), shape.ROWS) * shape.ROWS
    for i_member in range(0, group_size):
        queries = head_of(query, i_row, i_head + i_member, TMA=TMA)
        grads = head_of(grad, i_row, i_head + i_member, TMA=TMA)
        i_member_head = i_row * n_heads + i_head + i_member
        for i_query in range(begin, tl.minimum(clear, n_seeing), shape.ROWS):
            d_key, d_value = key_value_tile(
                d_key,
                d_value,
                key,
                value,
                keys=keys,
                values=values,
                queries=queries,
                grads=grads,
                sums=sums,
                p_selected=p_selected,
                i_head=i_member_head,
                i_query=i_query,
                n_queries=n_queries,
                n_seeing=n_seeing,
                query_start=query_start,
                document=document,
                block=block,
                piece=piece,
                factor=factor,
                shape=shape,
                TMA=TMA,
                CLEAR=False,
            )
        if shape.TOP_K > 0:
            p_first = listed.p_indptr + i_member_head.to(tl.int64) * (listed.n_blocks + 1)
            p_first += listed.i_block
            p_tiles = listed.p_tiles + i_member_head.to(tl.int64) * listed.tiles_stride
            n_first = tl.load(p_first)
            n_last = tl.load(p_first + 1)
            if SEGMENTS:
                # An unfinished block has no list; that of its number may be another's.
                n_last = tl.where(block < document.n_closed, n_last, n_first)
            for i_tile in range(n_first, n_last):
                d_key, d_value = key_value_tile(
                    d_key,
                    d_value,
                    key,
                    value,
                    keys=keys,
                    values=values,
                    queries=queries,
                    grads=grads,
                    sums=sums,
                    p_selected=p_selected,
                    i_head=i_member_head,
                    i_query=tl.load(p_tiles + i_tile) * shape.ROWS,
                    n_queries=n_queries,
                    n_seeing=n_seeing,
                    query_start=query_start,
                    document=document,
                    block=block,
                    piece=piece,
                    factor=factor,
                    shape=shape,
                    TMA=TMA,
                    CLEAR=True,
                )
        else:
            for i_query in range(clear, n_seeing, shape.ROWS):
                d_key, d_value = key_value_tile(
                    d_key,
                    d_value,
                    key,
                    value,
                    keys=keys,
                    values=values,
                    queries=queries,
                    grads=grads,
                    sums=sums,
                    p_selected=p_selected,
                    i_head=i_member_head,
                    i_query=i_query,
                    n_queries=n_queries,
                    n_seeing=n_seeing,
                    query_start=query_start,
                    document=document,
                    block=block,
                    piece=piece,
                    factor=factor,
                    shape=shape,
                    TMA=TMA,
                    CLEAR=True,
                )
        sums = SumPointers(p_lse=sums.p_lse + n_queries, p_delta=sums.p_delta + n_queries)
    o_key = key_offsets(piece, shape.BLOCK, shape.BLOCKS, shape.WIDTH)
    first_key = origin + block * shape.BLOCK
    store_rows(
        d_keys,
        first_key,
        o_key,
        origin + n_keys,
        rows=d_key * scale,
        DIM=shape.DIM,
        PADDED=shape.PADDED,
    )
    store_rows(
        d_values,
        first_key,
        o_key,
        origin + n_keys,
        rows=d_value,
        DIM=shape.DIM,
        PADDED=shape.PADDED,
    )


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
    p_selected,
    p_tiles,
    p_indptr,
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
    group_size,
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
    """Computes the gradients of a tile of keys and values.

    With segments a program visits one by one the blocks that begin in its window of the row.
    """
    n_tiles = tl.cdiv(n_keys, BLOCKS * BLOCK) * PIECES
    i_tile = tl.program_id(0) % n_tiles
    i_group = tl.program_id(0) // n_tiles
    i_row = i_group // (n_heads // group_size)
    i_group = i_group % (n_heads // group_size)
    i_head = i_group * group_size
    keys = head_of(HeadTensor(p_key, key_batch, key_head, key_stride), i_row, i_group, TMA=False)
    values = head_of(
        HeadTensor(p_value, value_batch, value_head, value_stride), i_row, i_group, TMA=False
    )
    d_keys = head_of(
        HeadTensor(p_d_key, d_key_batch, d_key_head, d_key_stride), i_row, i_group, TMA=False
    )
    d_values = head_of(
        HeadTensor(p_d_value, d_value_batch, d_value_head, d_value_stride),
        i_row,
        i_group,
        TMA=False,
    )
    query = HeadTensor(p_query, query_batch, query_head, query_stride)
    grad = HeadTensor(p_grad, grad_batch, grad_head, grad_stride)
    p_lse += (i_row * n_heads + i_head).to(tl.int64) * n_queries
    p_delta += (i_row * n_heads + i_head).to(tl.int64) * n_queries
    sums = SumPointers(p_lse=p_lse, p_delta=p_delta)
    start = 0
    if STARTS:
        start = tl.minimum(tl.load(p_start + i_row), n_keys)
    block = i_tile // PIECES * BLOCKS
    piece = i_tile % PIECES
    listed = ListedTiles(
        p_tiles=p_tiles,
        p_indptr=p_indptr,
        tiles_stride=tiles_stride,
        n_blocks=tl.cdiv(n_keys, BLOCK),
        i_block=block,
    )
    if SEGMENTS:
        p_origin += i_row.to(tl.int64) * n_keys
        p_end += i_row.to(tl.int64) * n_keys
        i_key = tl.maximum(block * BLOCK, start)
        stop = tl.minimum((block + 1) * BLOCK, n_keys)
        if i_key < stop:
            offset = (i_key - tl.load(p_origin + i_key)) % BLOCK
            if offset > 0:
                i_key = tl.minimum(i_key + BLOCK - offset, tl.load(p_end + i_key))
        while i_key < stop:
            origin = tl.load(p_origin + i_key)
            end = tl.load(p_end + i_key)
            key_value_blocks(
                keys,
                values,
                d_keys,
                d_values,
                query=query,
                grad=grad,
                sums=sums,
                p_selected=p_selected,
                listed=listed,
                i_row=i_row,
                i_head=i_head,
                n_heads=n_heads,
                group_size=group_size,
                origin=origin,
                end=end,
                block=(i_key - origin) // BLOCK,
                piece=piece,
                n_queries=n_queries,
                n_keys=n_keys,
                query_start=query_start,
                scale=scale,
                factor=factor,
                shape=TileShape(BLOCK, DIM, PADDED, ROWS, BLOCKS, WIDTH, PIECES, TOP_K, KEPT),
                SEGMENTS=True,
                TMA=TMA,
            )
            i_key = tl.minimum(i_key + BLOCK, end)
    else:
        key_value_blocks(
            keys,
            values,
            d_keys,
            d_values,
            query=query,
            grad=grad,
            sums=sums,
            p_selected=p_selected,
            listed=listed,
            i_row=i_row,
            i_head=i_head,
            n_heads=n_heads,
            group_size=group_size,
            origin=start,
            end=n_keys + n_queries + query_start,
            block=block,
            piece=piece,
            n_queries=n_queries,
            n_keys=n_keys,
            query_start=query_start,
            scale=scale,
            factor=factor,
            shape=TileShape(BLOCK, DIM, PADDED, ROWS, BLOCKS, WIDTH, PIECES, TOP_K, KEPT),
            SEGMENTS=False,
            TMA=TMA,
        )
