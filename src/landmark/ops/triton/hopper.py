"""The forward pass for Hopper (sm_90) with its pipeline spelled out in Gluon: rows without padding,
blocks of 64.

Triton lets the products and the exponentials of one program wait for each other. Here a program
owns 128 queries and has three parts that run at once: a loader, which brings keys and values by TMA
into two rings in shared memory, and two readers of 64 queries each, one own block. While a reader's
tensor cores multiply this block's values, its other units take the next block's softmax. The
arithmetic is that of ``forward.py``; ``docs/kernels.md`` draws the pipeline.

A ring is ``(tiles, full, empty)``: ``STAGES`` tiles, a barrier of each that opens when it is
loaded, and one that opens when both readers are done with it. The ``i``-th tile that passes through
lies at place ``i % STAGES``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from landmark.ops.triton.configs import PIPELINED_BLOCK

BLOCK = gl.constexpr(PIPELINED_BLOCK)
ROWS = gl.constexpr(2 * PIPELINED_BLOCK)
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
LOWEST = gl.constexpr(-1.0e30)
LN_2 = gl.constexpr(0.6931471805599453)
# Arguments for whose values nothing is compiled anew.
NUMBERS = ("n_heads", "group", "n_queries", "query_start")


@gluon.jit
def fetch(source, i_row, i_head, first, ring, i):
    """Loads rows ``first`` to ``first + 63`` of a head as the ``i``-th tile of a ring; zeros behind
    the tensor.
    """
    tiles, full, empty = ring
    STAGES: gl.constexpr = tiles.shape[0]
    place = i % STAGES
    mbarrier.wait(empty.index(place), ((i // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(place), source.block_type.nbytes)
    tma.async_copy_global_to_shared(
        source, [i_row, i_head, first, 0], full.index(place), tiles.index(place)
    )


@gluon.jit
def arrived(ring, i):
    """The ``i``-th tile (64, DIM) of a ring, once it is there."""
    tiles, full, _ = ring
    STAGES: gl.constexpr = tiles.shape[0]
    mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
    tile = tiles.index(i % STAGES)
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def release(ring, i):
    """Says that this reader is done with the ``i``-th tile."""
    tiles, _, empty = ring
    mbarrier.arrive(empty.index(i % tiles.shape[0]))


@gluon.jit
def load_tiles(keys, values, marks, key_ring, value_ring, i_row, i_head, own):
    """The loader: landmarks of past blocks; then blocks ``own + 1``, ``own``, ``0``, ``1``, ...
    ``own - 1``.

    ``own`` is the first reader's own block, ``own + 1`` the second's.
    """
    n_marks = (own + BLOCK) // BLOCK
    for i_marks in range(0, n_marks):
        fetch(marks, i_row, i_head, i_marks * BLOCK, key_ring, i_marks)
    for i in range(0, own + 2):
        block = gl.where(i < 2, own + 1 - i, i - 2)
        fetch(keys, i_row, i_head, block * BLOCK, key_ring, n_marks + i)
        fetch(values, i_row, i_head, block * BLOCK, value_ring, i)


@gluon.jit
def past_weights(
    scores, peak, total, factor, SCORES: gl.constexpr, WEIGHTS: gl.constexpr, dtype: gl.constexpr
):
    """Weights of a past block's text as an operand (64, 64), and the gate's total with that
    block.
    """
    o_slot = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))[None, :]
    mark = gl.sum(gl.where(o_slot == BLOCK - 1, scores, 0.0), 1)
    text = gl.where(o_slot < BLOCK - 1, scores, float("-inf"))
    exponent = gl.exp2(text * factor - (gl.max(text, 1) * factor)[:, None])
    gate = gl.exp2(mark * factor - peak)
    weights = exponent * (gate / gl.sum(exponent, 1))[:, None]
    return gl.convert_layout(weights.to(dtype), WEIGHTS), total + gate


@gluon.jit
def read_tiles(
    p_query,
    key_ring,
    value_ring,
    p_out,
    p_lse,
    query_stride,
    out_stride,
    n_queries,
    i_query,
    own,
    factor,
    READER: gl.constexpr,
):
    """A reader: output and log-sum-exp of the queries of block ``own + READER``."""
    DIM: gl.constexpr = key_ring[0].shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    QUERY: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    dtype: gl.constexpr = key_ring[0].dtype
    i_query += READER * BLOCK
    o_row = i_query + gl.arange(0, BLOCK, gl.SliceLayout(1, QUERY))
    o_dim = gl.arange(0, DIM, gl.SliceLayout(0, QUERY))
    p_rows = p_query + o_row[:, None].to(gl.int64) * query_stride + o_dim[None, :]
    query = gl.load(p_rows, mask=(o_row < n_queries)[:, None], other=0.0)
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, SCORES)
    o_slot = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    o_query = gl.arange(0, BLOCK, gl.SliceLayout(1, SCORES))

    # The highest logit of all past blocks, from their landmarks.
    peak = gl.full([BLOCK], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    i = 0
    n_marks = (own + BLOCK) // BLOCK
    for i_marks in range(0, n_marks):
        scores = warpgroup_mma(query, arrived(key_ring, i).permute((1, 0)), zero, use_acc=False)
        release(key_ring, i)
        past = i_marks * BLOCK + o_slot < own + READER
        peak = gl.maximum(peak, gl.max(gl.where(past[None, :], scores, LOWEST), 1) * factor)
        i += 1
    j = 0
    if READER == 0:  # the other reader's own block
        arrived(key_ring, i)
        release(key_ring, i)
        arrived(value_ring, j)
        release(value_ring, j)
        i += 1
        j += 1

    # The own block.
    scores = warpgroup_mma(query, arrived(key_ring, i).permute((1, 0)), zero, use_acc=False)
    release(key_ring, i)
    i += 1
    seen = (o_slot[None, :] <= o_query[:, None]) & (o_slot < BLOCK - 1)[None, :]
    text = gl.where(seen, scores, float("-inf"))
    peak = gl.maximum(peak, gl.max(text, 1) * factor)
    exponent = gl.exp2(text * factor - peak[:, None])
    total = gl.sum(exponent, 1)
    weights = gl.convert_layout(exponent.to(dtype), WEIGHTS)
    out = gl.zeros([BLOCK, DIM], gl.float32, OUT)
    out = warpgroup_mma(weights, arrived(value_ring, j), out, use_acc=False)
    release(value_ring, j)
    j += 1

    # Past blocks: the next one's scores and this one's values are multiplied while the next softmax
    # is waited for.
    if own + READER > 0:
        scores = warpgroup_mma(query, arrived(key_ring, i).permute((1, 0)), zero, use_acc=False)
        release(key_ring, i)
        i += 1
        weights, total = past_weights(scores, peak, total, factor, SCORES, WEIGHTS, dtype)
        for _ in range(1, own + READER):
            key = arrived(key_ring, i).permute((1, 0))
            running_scores = warpgroup_mma(query, key, zero, use_acc=False, is_async=True)
            running_out = warpgroup_mma(weights, arrived(value_ring, j), out, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[running_scores])
            release(key_ring, i)
            following, total = past_weights(scores, peak, total, factor, SCORES, WEIGHTS, dtype)
            out, weights = warpgroup_mma_wait(0, deps=[running_out, weights])
            release(value_ring, j)
            weights = following
            i += 1
            j += 1
        out = warpgroup_mma(weights, arrived(value_ring, j), out)

    o_row = i_query + gl.arange(0, BLOCK, gl.SliceLayout(1, OUT))
    o_dim = gl.arange(0, DIM, gl.SliceLayout(0, OUT))
    result = out * gl.convert_layout(1 / total, gl.SliceLayout(1, OUT))[:, None]
    p_rows = p_out + o_row[:, None].to(gl.int64) * out_stride + o_dim[None, :]
    gl.store(p_rows, result.to(dtype), mask=(o_row < n_queries)[:, None])
    gl.store(
        p_lse + i_query + o_query,
        (peak + gl.log2(total)) * LN_2,
        mask=i_query + o_query < n_queries,
    )


@gluon.jit
def first_reader(
    p_query,
    key_ring,
    value_ring,
    p_out,
    p_lse,
    query_stride,
    out_stride,
    n_queries,
    i_query,
    own,
    factor,
):
    """The reader of block ``own``."""
    read_tiles(
        p_query,
        key_ring,
        value_ring,
        p_out,
        p_lse,
        query_stride,
        out_stride,
        n_queries,
        i_query,
        own,
        factor,
        0,
    )


@gluon.jit
def second_reader(
    p_query,
    key_ring,
    value_ring,
    p_out,
    p_lse,
    query_stride,
    out_stride,
    n_queries,
    i_query,
    own,
    factor,
):
    """The reader of block ``own + 1``."""
    read_tiles(
        p_query,
        key_ring,
        value_ring,
        p_out,
        p_lse,
        query_stride,
        out_stride,
        n_queries,
        i_query,
        own,
        factor,
        1,
    )


@gluon.jit
def make_ring(source, STAGES: gl.constexpr):
    """An empty ring for tiles of ``source``, with two readers."""
    tiles = gl.allocate_shared_memory(
        source.dtype,
        [STAGES] + source.block_type.shape,  # noqa: RUF005
        source.layout,
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), 1)
        mbarrier.init(empty.index(place), 2)
    return tiles, full, empty


@gluon.jit(do_not_specialize=NUMBERS)
def pipelined_kernel(
    p_query,
    key,
    value,
    mark,
    p_out,
    p_lse,
    query_batch,
    query_head,
    query_stride,
    out_batch,
    out_head,
    out_stride,
    n_heads,
    group,
    n_queries,
    query_start,
    factor,
    STAGES: gl.constexpr,
):
    """Output and log-sum-exp of 128 queries; of a head's tiles those that see most come first.

    ``key``, ``value`` and ``mark`` (the landmarks' keys) are descriptors (B, heads, rows, DIM),
    boxes (1, 1, 64, DIM).
    """
    n_tiles = gl.cdiv(n_queries, ROWS)
    i_query = (n_tiles - 1 - gl.program_id(0) % n_tiles) * ROWS
    i_row = gl.program_id(0) // n_tiles // n_heads
    i_head = gl.program_id(0) // n_tiles % n_heads
    own = (query_start + i_query) // BLOCK
    p_query += i_row.to(gl.int64) * query_batch + i_head.to(gl.int64) * query_head
    p_out += i_row.to(gl.int64) * out_batch + i_head.to(gl.int64) * out_head
    p_lse += (i_row * n_heads + i_head).to(gl.int64) * n_queries

    key_ring = make_ring(key, STAGES)
    value_ring = make_ring(value, STAGES)
    shared = (
        p_query,
        key_ring,
        value_ring,
        p_out,
        p_lse,
        query_stride,
        out_stride,
        n_queries,
        i_query,
        own,
        factor,
    )
    gl.warp_specialize(
        [
            (first_reader, shared),
            (second_reader, shared),
            (load_tiles, (key, value, mark, key_ring, value_ring, i_row, i_head // group, own)),
        ],
        [4, 1],  # warps of the second reader and of the loader
        [240, 24],  # registers of their threads; the first reader has the rest
    )
