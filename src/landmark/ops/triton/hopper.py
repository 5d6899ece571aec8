"""Forward kernel for Hopper (sm_90) in Gluon, for rows without padding and blocks of 64.

In ``forward.py`` the products and the exponentials of one program wait for each other. Here a
program computes 128 queries and has three parts that run at once. A loader brings keys and values
by TMA into two ring buffers in shared memory. Two readers compute 64 queries each, which are one
own block. While a reader's tensor cores multiply this block's values, its other units compute the
next block's softmax. The arithmetic is that of ``forward.py``; ``docs/kernels.md`` draws the
pipeline.

A ring is ``(tiles, full, empty)``: ``STAGES`` tiles; a barrier of each that opens when the tile is
loaded; and one that opens when both readers are done with it. The ``i``-th tile that passes through
a ring lies at ``i % STAGES``.
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
NUMBERS = ("n_heads", "group_size", "n_queries", "query_start")


@gluon.jit
def fetch(source, i_row, i_head, first, ring, i):
    """Loads 64 rows of a head, from ``first`` on, as the ``i``-th tile of a ring.

    Rows behind the tensor are zeros.
    """
    tiles, full, empty = ring
    STAGES: gl.constexpr = tiles.shape[0]
    i_tile = i % STAGES
    mbarrier.wait(empty.index(i_tile), ((i // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(i_tile), source.block_type.nbytes)
    tma.async_copy_global_to_shared(
        source, [i_row, i_head, first, 0], full.index(i_tile), tiles.index(i_tile)
    )


@gluon.jit
def arrived(ring, i):
    """Waits for the ``i``-th tile of a ring and returns it, (64, DIM)."""
    tiles, full, _ = ring
    STAGES: gl.constexpr = tiles.shape[0]
    mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
    tile = tiles.index(i % STAGES)
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def release(ring, i):
    """Gives the ``i``-th tile back to the loader, as far as this reader is concerned."""
    tiles, _, empty = ring
    mbarrier.arrive(empty.index(i % tiles.shape[0]))


@gluon.jit
def load_tiles(keys, values, landmark_keys, key_ring, value_ring, i_row, i_head, own):
    """Runs as the loader.

    It loads landmarks of past blocks, then blocks ``own + 1``, ``own``, ``0``, ``1``, ...
    ``own - 1``. The first reader's own block is ``own``, the second's ``own + 1``.
    """
    n_loads = (own + BLOCK) // BLOCK
    for i_load in range(0, n_loads):
        fetch(landmark_keys, i_row, i_head, i_load * BLOCK, key_ring, i_load)
    for i in range(0, own + 2):
        block = gl.where(i < 2, own + 1 - i, i - 2)
        fetch(keys, i_row, i_head, block * BLOCK, key_ring, n_loads + i)
        fetch(values, i_row, i_head, block * BLOCK, value_ring, i)


@gluon.jit
def past_weights(
    scores, peak, total, factor, SCORES: gl.constexpr, WEIGHTS: gl.constexpr, dtype: gl.constexpr
):
    """Returns weights of a past block's text (64, 64), and the gate's total with that block.

    The weights are laid out as the left operand of a product.
    """
    o_slot = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))[None, :]
    landmark = gl.sum(gl.where(o_slot == BLOCK - 1, scores, 0.0), 1)
    text = gl.where(o_slot < BLOCK - 1, scores, float("-inf"))
    exponent = gl.exp2(text * factor - (gl.max(text, 1) * factor)[:, None])
    gate = gl.exp2(landmark * factor - peak)
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
    """Runs as a reader: computes the queries whose own block is ``own + READER``."""
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
    n_loads = (own + BLOCK) // BLOCK
    for i_load in range(0, n_loads):
        scores = warpgroup_mma(query, arrived(key_ring, i).permute((1, 0)), zero, use_acc=False)
        release(key_ring, i)
        past = i_load * BLOCK + o_slot < own + READER
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
    """Runs as the reader of block ``own``."""
    read_tiles(
        p_query=p_query,
        key_ring=key_ring,
        value_ring=value_ring,
        p_out=p_out,
        p_lse=p_lse,
        query_stride=query_stride,
        out_stride=out_stride,
        n_queries=n_queries,
        i_query=i_query,
        own=own,
        factor=factor,
        READER=0,
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
    """Runs as the reader of block ``own + 1``."""
    read_tiles(
        p_query=p_query,
        key_ring=key_ring,
        value_ring=value_ring,
        p_out=p_out,
        p_lse=p_lse,
        query_stride=query_stride,
        out_stride=out_stride,
        n_queries=n_queries,
        i_query=i_query,
        own=own,
        factor=factor,
        READER=1,
    )


@gluon.jit
def make_ring(source, STAGES: gl.constexpr):
    """Makes an empty ring for tiles of ``source``, with two readers."""
    tiles = gl.allocate_shared_memory(
        source.dtype,
        [STAGES] + source.block_type.shape,  # noqa: RUF005
        source.layout,
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i_tile in gl.static_range(STAGES):
        mbarrier.init(full.index(i_tile), 1)
        mbarrier.init(empty.index(i_tile), 2)
    return tiles, full, empty


@gluon.jit(do_not_specialize=NUMBERS)
def pipelined_kernel(
    p_query,
    key,
    value,
    landmark_key,
    p_out,
    p_lse,
    query_batch,
    query_head,
    query_stride,
    out_batch,
    out_head,
    out_stride,
    n_heads,
    group_size,
    n_queries,
    query_start,
    factor,
    STAGES: gl.constexpr,
):
    """Computes output and log-sum-exp of 128 queries.

    Of a head's tiles those that see most come first. ``key``, ``value`` and ``landmark_key`` are
    descriptors of tensors (B, heads, rows, DIM) with boxes (1, 1, 64, DIM).
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
    loaded = (
        key,
        value,
        landmark_key,
        key_ring,
        value_ring,
        i_row,
        i_head // group_size,
        own,
    )
    gl.warp_specialize(
        [
            (first_reader, shared),
            (second_reader, shared),
            (load_tiles, loaded),
        ],
        [4, 1],  # warps of the second reader and of the loader
        [240, 24],  # registers of their threads; the first reader has the rest
    )
