"""One tile of queries against one tile of keys: what all kernels share. ``docs/kernels.md`` derives
it.

A tile of keys holds ``BLOCKS`` whole blocks, each at ``WIDTH`` places (a power of two), or one of
the ``PIECES`` pieces of a longer block. Scores (ROWS, BLOCKS * WIDTH) come from a product; seen as
(ROWS, BLOCKS, WIDTH), all that concerns a block is a sum or maximum over the last dimension. Slots
count from the origin of the document. A ``factor`` brings scores to units of log2, so that ``exp2``
needs no further product.

``p_`` pointer or tensor descriptor, ``i_`` index, ``o_`` offsets, ``n_`` count. Constants:
``BLOCK`` the block size, ``DIM`` the head dim, ``PADDED`` the power of two that holds it, ``CLEAR``
whether all blocks of the tile are past blocks of all its queries.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments of the kernels for whose values nothing is compiled anew.
NUMBERS = (
    "n_heads",
    "group",
    "n_queries",
    "n_keys",
    "query_start",
    "listed_stride",
    "tiles_stride",
)


@triton.jit
def head_of(p_tensor, batch_stride, head_stride, row_stride, i_row, i_head, TMA: tl.constexpr):
    """One head's matrix, as ``load_rows`` takes it; a descriptor knows its strides, a pointer is
    moved there.
    """
    if TMA:
        matrix = (p_tensor, i_row, i_head)
    else:
        p_head = p_tensor + i_row.to(tl.int64) * batch_stride + i_head.to(tl.int64) * head_stride
        matrix = (p_head, row_stride, 0)
    return matrix


@triton.jit
def load_rows(
    matrix,
    first,
    o_row,
    n_rows,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Rows ``first + o_row`` (ROWS,) of a head's matrix (n_rows, DIM) as (ROWS, PADDED).

    Zeros from row ``n_rows`` on and where ``o_row`` is -1; ``WHOLE`` says that there are none such.
    A descriptor loads the rows from ``first`` on and puts zeros behind its tensor only: what lies
    behind ``n_rows`` the caller must hide.
    """
    if TMA:
        rows = tl.reshape(matrix[0].load([matrix[1], matrix[2], first, 0]), (ROWS, PADDED))
    else:
        o_dim = tl.arange(0, PADDED)
        p_rows = (
            matrix[0]
            + tl.cast(first, tl.int64) * matrix[1]
            + (o_row * matrix[1])[:, None]
            + o_dim[None, :]
        )
        inside = ((o_row >= 0) & (first + o_row < n_rows))[:, None]
        if WHOLE and DIM == PADDED:
            rows = tl.load(p_rows)
        elif WHOLE:
            rows = tl.load(p_rows, mask=(o_dim < DIM)[None, :], other=0.0)
        elif DIM == PADDED:
            rows = tl.load(p_rows, mask=inside, other=0.0)
        else:
            rows = tl.load(p_rows, mask=inside & (o_dim < DIM)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(matrix, first, o_row, n_rows, rows, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The inverse of ``load_rows``, by pointers; nothing is stored outside."""
    p_matrix, row_stride, _ = matrix
    o_dim = tl.arange(0, PADDED)
    pointers = (
        p_matrix
        + tl.cast(first, tl.int64) * row_stride
        + (o_row * row_stride)[:, None]
        + o_dim[None, :]
    )
    inside = ((o_row >= 0) & (first + o_row < n_rows))[:, None] & (o_dim < DIM)[None, :]
    tl.store(pointers, rows.to(p_matrix.dtype.element_ty), mask=inside)


@triton.jit
def key_places(piece, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Slots (BLOCKS * WIDTH,) of the keys of a tile, from the first of its first block; -1 at empty
    places.
    """
    o_key = tl.arange(0, BLOCKS * WIDTH)
    if BLOCK == WIDTH:
        return o_key
    place = piece * WIDTH + o_key % WIDTH
    return tl.where(place < BLOCK, o_key // WIDTH * BLOCK + place, -1)


@triton.jit
def load_keys(
    matrix,
    origin,
    block,
    piece,
    n_keys,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Keys or values (BLOCKS * WIDTH, PADDED) of the blocks from ``block`` on, or of a piece of
    it.
    """
    first = origin + block * BLOCK
    if TMA:
        first += piece * WIDTH
    o_key = key_places(piece, BLOCK, BLOCKS, WIDTH)
    return load_rows(
        matrix,
        first,
        o_key,
        origin + n_keys,
        BLOCKS * WIDTH,
        DIM,
        PADDED,
        TMA,
        CLEAR and BLOCK == WIDTH,
    )


@triton.jit
def visible(
    first,
    o_slot,
    origin,
    end,
    n_keys,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """What queries at ``o_slot`` (ROWS,), the first at ``first``, see of the document from
    ``origin`` to ``end``.

    Returns their slots and own blocks in it (-1 for none), how many keys and closed blocks it has,
    and the blocks up to which all are past blocks of all queries, and up to which any is seen.
    """
    n_keys = tl.minimum(n_keys, end) - origin
    n_closed = n_keys // BLOCK
    slot = o_slot - origin
    own = tl.where((slot >= 0) & (o_slot < end), slot // BLOCK, -1)
    last = tl.minimum(first + ROWS, end) - 1 - origin
    n_seen = tl.minimum(last // BLOCK + 1, tl.cdiv(n_keys, BLOCK))
    n_clear = 0
    if (first >= origin) & (end >= first + ROWS):
        n_clear = tl.minimum((first - origin) // BLOCK, n_closed) // BLOCKS * BLOCKS
    return slot, own, n_keys, n_closed, n_clear, n_seen


@triton.jit
def relation(block, own, chosen, n_closed, BLOCKS: tl.constexpr, TOP_K: tl.constexpr):
    """Which blocks (ROWS, BLOCKS) are past blocks of a query, and which is its own.

    With ``TOP_K``, only the ``chosen`` ones (ROWS, a power of two) are past blocks, and a tile
    holds one block.
    """
    o_block = block + tl.arange(0, BLOCKS)[None, :]
    past = (o_block < own[:, None]) & (o_block < n_closed)
    if TOP_K > 0:
        past = past & (tl.max((chosen == block).to(tl.int32), axis=1) > 0)[:, None]
    return past, o_block == own[:, None]


@triton.jit
def load_choice(p_chosen, i_head, n_rows, first, o_row, TOP_K: tl.constexpr, KEPT: tl.constexpr):
    """The chosen blocks (ROWS, KEPT) of queries ``first + o_row`` of a row's head, -1 for none; 0
    without ``TOP_K``.
    """
    chosen = 0
    if TOP_K > 0:
        o_kept = tl.arange(0, KEPT)
        p_first = p_chosen + (i_head.to(tl.int64) * n_rows + first) * TOP_K
        inside = (first + o_row < n_rows)[:, None] & (o_kept < TOP_K)[None, :]
        chosen = tl.load(p_first + o_row[:, None] * TOP_K + o_kept[None, :], mask=inside, other=-1)
    return chosen


@triton.jit
def text_scores(
    scores,
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
    """Scores of text (ROWS, BLOCKS, WIDTH), ``-inf`` elsewhere, and those of landmarks (ROWS,
    BLOCKS), 0 elsewhere.
    """
    scores = tl.reshape(scores, (ROWS, BLOCKS, WIDTH))
    place = piece * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    mark = tl.sum(tl.where(place == BLOCK - 1, scores, 0.0), axis=2)
    seen = place < BLOCK - 1
    if not CLEAR:
        key = (block + tl.arange(0, BLOCKS)[None, :, None]) * BLOCK + place
        seen = seen & (key < n_keys) & (key <= slot[:, None, None])
    return tl.where(seen, scores, float("-inf")), mark


@triton.jit
def gate_logit(peak, total, mark, past, own, CLEAR: tl.constexpr):
    """What each block (ROWS, BLOCKS) brings to the gate: its landmark's score, the peak of the own
    text, or nothing.
    """
    if CLEAR:
        return mark
    return tl.where(past, mark, tl.where(own & (total > 0), peak, float("-inf")))


@triton.jit
def gate_mass(gate, total, past, CLEAR: tl.constexpr):
    """Weight of a whole block in the gate."""
    if CLEAR:
        return gate
    return tl.where(past, gate, gate * total)


@triton.jit
def text_share(gate, total, past, CLEAR: tl.constexpr):
    """Weight of text over ``exp2(score - peak)``: a past block shares its gate weight out, own text
    has its own.

    ``total`` is at least 1 where there is text: the peak alone brings that.
    """
    if CLEAR:
        return gate / total
    return tl.where(past, gate / tl.maximum(total, 1.0), gate)


@triton.jit
def score_gradient(
    exponent,
    products,
    share,
    gate,
    mean,
    past,
    delta,
    piece,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Derivative of the scaled scores (ROWS, BLOCKS, WIDTH).

    ``exponent`` is ``exp2(score - peak)``, ``share`` and ``gate`` as above, ``products`` those of
    the output's gradient and each value, ``mean`` their in-block mean (ROWS, BLOCKS), ``delta``
    (ROWS,) the product of gradient and output less the gradient of the log-sum-exp.
    """
    base = mean
    mark = gate * (mean - delta[:, None])
    if not CLEAR:
        base = tl.where(past, mean, delta[:, None])
        mark = tl.where(past, mark, 0.0)
    text = exponent * share[:, :, None] * (products - base[:, :, None])
    place = piece * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return tl.where(place == BLOCK - 1, mark[:, :, None], text)
