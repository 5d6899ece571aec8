"""Device functions that all kernels share: one tile of queries against one tile of keys.

``docs/kernels.md`` derives them. A tile of keys holds ``BLOCKS`` whole blocks, each padded to
``WIDTH`` columns (a power of two), or one of the ``PIECES`` pieces of a longer block. Scores
(ROWS, BLOCKS * WIDTH) come from one product. Seen as (ROWS, BLOCKS, WIDTH), all that concerns a
block is a sum or maximum over the last dimension. Slots count from the first slot of the document.
A ``factor`` brings scores to units of log2, so that ``exp2`` needs no further product.

Names: ``p_`` pointer or tensor descriptor, ``i_`` index, ``o_`` offsets, ``n_`` count. ``CLEAR``
says that all blocks of a tile of keys are past blocks of all its queries.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments of the kernels for whose values nothing is compiled anew.
NUMBERS = (
    "n_heads",
    "group_size",
    "n_queries",
    "n_keys",
    "query_start",
    "listed_stride",
    "tiles_stride",
)


class TileShape(NamedTuple):
    """Constants of a kernel over tiles.

    Device functions take it as an argument. It is never assigned to a variable, as Triton would
    make tensors of its constants.

    Attributes:
        BLOCK: slots of a block, landmark included.
        DIM: head dim.
        PADDED: the power of two that holds it.
        ROWS: queries of a tile.
        BLOCKS: blocks of a tile of keys; 1 where blocks are read in pieces.
        WIDTH: columns of a block, or of a piece of it, in a tile of keys.
        PIECES: pieces of a block.
        TOP_K: past blocks that a query selects, 0 for all.
        KEPT: the power of two that holds ``TOP_K``, 0 for all.
    """

    BLOCK: Any
    DIM: Any
    PADDED: Any
    ROWS: Any
    BLOCKS: Any
    WIDTH: Any
    PIECES: Any
    TOP_K: Any
    KEPT: Any


class HeadTensor(NamedTuple):
    """A tensor (B, heads, rows, DIM) with its strides.

    Attributes:
        p_tensor: pointer to it, or its descriptor.
        batch_stride: distance between rows of the batch.
        head_stride: distance between heads.
        row_stride: distance between rows.
    """

    p_tensor: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any


class Matrix(NamedTuple):
    """One head of a tensor (B, heads, rows, DIM), as ``load_rows`` takes it.

    Attributes:
        p_rows: pointer to the head's first row, or a descriptor of the whole tensor.
        row_stride: distance between rows; of a pointer only.
        i_row: row of the batch; of a descriptor only.
        i_head: the head; of a descriptor only.
    """

    p_rows: Any
    row_stride: Any
    i_row: Any
    i_head: Any


class PackedDocument(NamedTuple):
    """Keys of one document of a row; a row without ``segments`` is one document.

    Attributes:
        origin: first slot of the document in its row.
        n_keys: how many keys it has.
        n_closed: how many finished blocks it has.
    """

    origin: Any
    n_keys: Any
    n_closed: Any


class Queries(NamedTuple):
    """A tile of queries as it sees one document.

    Attributes:
        query: (ROWS, PADDED).
        slot: (ROWS,) slots, counted from the first of the document.
        own_block: (ROWS,) own blocks; -1 for a query of another document.
        selected: (ROWS, KEPT) selected blocks, -1 for none; 0 without ``TOP_K``.
    """

    query: Any
    slot: Any
    own_block: Any
    selected: Any


class ListedBlocks(NamedTuple):
    """Blocks that ``BlockLists`` has for a tile of queries.

    Attributes:
        p_blocks: pointer to the first of them.
        n_blocks: how many there are.
    """

    p_blocks: Any
    n_blocks: Any


@triton.jit
def head_of(tensor, i_row, i_head, TMA: tl.constexpr):
    """Returns one head of a ``HeadTensor`` as a ``Matrix``; a pointer is moved to the head."""
    if TMA:
        matrix = Matrix(p_rows=tensor.p_tensor, row_stride=0, i_row=i_row, i_head=i_head)
    else:
        o_batch = i_row.to(tl.int64) * tensor.batch_stride
        p_head = tensor.p_tensor + o_batch + i_head.to(tl.int64) * tensor.head_stride
        matrix = Matrix(p_rows=p_head, row_stride=tensor.row_stride, i_row=0, i_head=0)
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
    """Loads rows ``first + o_row`` (ROWS,) of a matrix (n_rows, DIM) as (ROWS, PADDED).

    Zeros from row ``n_rows`` on and where ``o_row`` is -1; ``WHOLE`` says that there are none such.
    A descriptor loads the rows from ``first`` on and puts zeros behind its tensor only: the caller
    must hide what lies behind ``n_rows``.
    """
    if TMA:
        rows = tl.reshape(
            matrix.p_rows.load([matrix.i_row, matrix.i_head, first, 0]), (ROWS, PADDED)
        )
    else:
        o_dim = tl.arange(0, PADDED)
        p_rows = (
            matrix.p_rows
            + tl.cast(first, tl.int64) * matrix.row_stride
            + (o_row * matrix.row_stride)[:, None]
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
    """Inverts ``load_rows``, by pointers; nothing is stored outside the matrix."""
    o_dim = tl.arange(0, PADDED)
    p_rows = (
        matrix.p_rows
        + tl.cast(first, tl.int64) * matrix.row_stride
        + (o_row * matrix.row_stride)[:, None]
        + o_dim[None, :]
    )
    inside = ((o_row >= 0) & (first + o_row < n_rows))[:, None] & (o_dim < DIM)[None, :]
    tl.store(p_rows, rows.to(matrix.p_rows.dtype.element_ty), mask=inside)


@triton.jit
def key_offsets(piece, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the slots (BLOCKS * WIDTH,) of a tile's keys, counted from the tile's first block.

    -1 in columns without key.
    """
    o_key = tl.arange(0, BLOCKS * WIDTH)
    if BLOCK == WIDTH:
        return o_key
    offset = piece * WIDTH + o_key % WIDTH
    return tl.where(offset < BLOCK, o_key // WIDTH * BLOCK + offset, -1)


@triton.jit
def load_keys(matrix, document, block, piece, shape, TMA: tl.constexpr, CLEAR: tl.constexpr):
    """Loads keys or values (BLOCKS * WIDTH, PADDED) from ``block`` on, or of a piece of it."""
    first = document.origin + block * shape.BLOCK
    if TMA:
        first += piece * shape.WIDTH
    o_key = key_offsets(piece, shape.BLOCK, shape.BLOCKS, shape.WIDTH)
    return load_rows(
        matrix,
        first,
        o_key,
        document.origin + document.n_keys,
        ROWS=shape.BLOCKS * shape.WIDTH,
        DIM=shape.DIM,
        PADDED=shape.PADDED,
        TMA=TMA,
        WHOLE=CLEAR and shape.BLOCK == shape.WIDTH,
    )


@triton.jit
def visible(first, o_slot, origin, end, n_keys, shape):
    """Says what queries at ``o_slot`` (ROWS,), the first at ``first``, see of a document.

    The document lies from slot ``origin`` to ``end`` of a row of ``n_keys`` keys. Returns the
    queries' slots in it, their own blocks there (-1 for none), the document, and two counts of
    blocks: so many first ones are past blocks of all queries, and so many are seen by any.
    """
    n_keys = tl.minimum(n_keys, end) - origin
    n_closed = n_keys // shape.BLOCK
    slot = o_slot - origin
    own_block = tl.where((slot >= 0) & (o_slot < end), slot // shape.BLOCK, -1)
    last = tl.minimum(first + shape.ROWS, end) - 1 - origin
    n_seen = tl.minimum(last // shape.BLOCK + 1, tl.cdiv(n_keys, shape.BLOCK))
    n_clear = 0
    inside = first >= origin
    if shape.TOP_K == 0:
        inside = inside & (end >= first + shape.ROWS)
    if inside:
        n_clear = tl.minimum((first - origin) // shape.BLOCK, n_closed)
        n_clear = n_clear // shape.BLOCKS * shape.BLOCKS
    document = PackedDocument(origin=origin, n_keys=n_keys, n_closed=n_closed)
    return slot, own_block, document, n_clear, n_seen


@triton.jit
def relation(block, own_block, selected, n_closed, shape):
    """Returns whether blocks (ROWS, BLOCKS) are past blocks of a query, and whether its own.

    With ``TOP_K``, only the ``selected`` ones are past blocks, and a tile holds one block.
    """
    o_block = block + tl.arange(0, shape.BLOCKS)[None, :]
    past = (o_block < own_block[:, None]) & (o_block < n_closed)
    if shape.TOP_K > 0:
        past = past & (tl.max((selected == block).to(tl.int32), axis=1) > 0)[:, None]
    return past, o_block == own_block[:, None]


@triton.jit
def load_selected(
    p_selected, i_head, n_rows, first, o_row, TOP_K: tl.constexpr, KEPT: tl.constexpr
):
    """Loads the selected blocks (ROWS, KEPT) of a head's queries ``first + o_row``.

    -1 for none; 0 without ``TOP_K``.
    """
    selected = 0
    if TOP_K > 0:
        o_kept = tl.arange(0, KEPT)
        p_first = p_selected + (i_head.to(tl.int64) * n_rows + first) * TOP_K
        inside = (first + o_row < n_rows)[:, None] & (o_kept < TOP_K)[None, :]
        p_rows = p_first + o_row[:, None] * TOP_K + o_kept[None, :]
        selected = tl.load(p_rows, mask=inside, other=-1)
    return selected


@triton.jit
def text_scores(scores, slot, block, piece, n_keys, shape, CLEAR: tl.constexpr):
    """Splits scores into those of text (ROWS, BLOCKS, WIDTH) and of landmarks (ROWS, BLOCKS).

    Text that a query does not see has ``-inf``; a landmark outside the tile has 0.
    """
    scores = tl.reshape(scores, (shape.ROWS, shape.BLOCKS, shape.WIDTH))
    offset = piece * shape.WIDTH + tl.arange(0, shape.WIDTH)[None, None, :]
    landmark = tl.sum(tl.where(offset == shape.BLOCK - 1, scores, 0.0), axis=2)
    seen = offset < shape.BLOCK - 1
    if not CLEAR:
        key = (block + tl.arange(0, shape.BLOCKS)[None, :, None]) * shape.BLOCK + offset
        seen = seen & (key < n_keys) & (key <= slot[:, None, None])
    return tl.where(seen, scores, float("-inf")), landmark


@triton.jit
def gate_logit(peak, total, landmark, past, own, CLEAR: tl.constexpr):
    """Returns the logit of each block (ROWS, BLOCKS) in the gate.

    For a past block its landmark's score, for the own block the peak of its text, else ``-inf``.
    """
    if CLEAR:
        return landmark
    return tl.where(past, landmark, tl.where(own & (total > 0), peak, float("-inf")))


@triton.jit
def gate_mass(gate, total, past, CLEAR: tl.constexpr):
    """Returns the weight of a whole block in the gate."""
    if CLEAR:
        return gate
    return tl.where(past, gate, gate * total)


@triton.jit
def text_share(gate, total, past, CLEAR: tl.constexpr):
    """Returns the weight of text over ``exp2(score - peak)``.

    A past block shares out its gate weight; own text has a gate weight of its own. ``total`` is at
    least 1 where there is text, as the text at the peak brings that alone.
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
    """Returns the derivative of the scaled scores (ROWS, BLOCKS, WIDTH).

    ``exponent`` is ``exp2(score - peak)``, ``share`` and ``gate`` as above, ``products`` those of
    the output's gradient and each value, ``mean`` their in-block mean (ROWS, BLOCKS), ``delta``
    (ROWS,) the product of gradient and output less the gradient of the log-sum-exp.
    """
    base = mean
    landmark = gate * (mean - delta[:, None])
    if not CLEAR:
        base = tl.where(past, mean, delta[:, None])
        landmark = tl.where(past, landmark, 0.0)
    text = exponent * share[:, :, None] * (products - base[:, :, None])
    offset = piece * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return tl.where(offset == BLOCK - 1, landmark[:, :, None], text)
