"""Device functions that the kernels of this folder share.

Queries lie on the grid (B, G, R, n, W) of ``memory/geometry.py``. Keys are rotated by their offset
inside their block only, so a query is rotated by its distance, in blocks, to each block that it
reads. Scores are in units of log2.

Prefixes: ``p_`` pointer, ``i_`` index, ``o_`` offsets, ``n_`` count. Constants: ``BLOCK`` the block
size, ``WIDTH`` the power of two that holds it, ``DIM`` the head dim, ``PADDED`` the power of two
that holds that, ``ROTATED`` how many columns are rotated, ``INTERLEAVED`` whether adjacent columns
are rotated together (otherwise halves). The *index* of a block is where the store keeps its
landmark key: 0 for block 0, ``block - first_kept + 1`` for others.
"""

import triton
import triton.language as tl

ALIGNED = tl.constexpr(8)  # numbers: every head dim is a multiple
# Strides of heads of the memory. Nothing is compiled anew when the memory grows, so that sums are
# taken in the same order.
STRIDES = (
    "landmark_batch",
    "landmark_group",
    "store_batch",
    "store_group",
    "selected_batch",
    "selected_group",
)


@triton.jit
def load_queries(
    p_rows,
    inside,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Returns queries (rows, PADDED) at ``p_rows`` (rows, 1), and their partner columns, in
    float32.
    """
    o_dim = tl.arange(0, PADDED)
    o_half = tl.where(o_dim < ROTATED // 2, o_dim + ROTATED // 2, o_dim - ROTATED // 2)
    o_partner = tl.where(o_dim < ROTATED, o_dim ^ 1 if INTERLEAVED else o_half, o_dim)
    mask = inside & (o_dim < DIM)[None, :]
    query = tl.load(p_rows + o_dim[None, :], mask=mask, other=0.0).to(tl.float32)
    return query, tl.load(p_rows + o_partner[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rotation(p_cos, p_sin, distance, PADDED: tl.constexpr, ROTATED: tl.constexpr):
    """Returns cosine and signed sine of a ``distance`` in blocks, which is one or (rows, 1)."""
    o_dim = tl.arange(0, PADDED)[None, :]
    o_angle = distance * ROTATED + o_dim
    cos = tl.load(p_cos + o_angle, mask=o_dim < ROTATED, other=1.0)
    return cos, tl.load(p_sin + o_angle, mask=o_dim < ROTATED, other=0.0)


@triton.jit
def rotate(
    p_rows,
    inside,
    p_cos,
    p_sin,
    distance,
    scale,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Returns queries (rows, PADDED) at ``p_rows`` (rows, 1), rotated and scaled, in float32.

    ``distance``, in blocks, is one for all rows or (rows, 1).
    """
    query, partner = load_queries(p_rows, inside, DIM, PADDED, ROTATED, INTERLEAVED)
    cos, sin = load_rotation(p_cos, p_sin, distance, PADDED, ROTATED)
    return (query * cos + partner * sin) * scale


@triton.jit
def load_block(
    p_head, index, BLOCK: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr
):
    """Returns keys or values (WIDTH, PADDED) of the block at ``index``; zeros outside."""
    o_slot = tl.arange(0, WIDTH)[:, None]
    o_dim = tl.arange(0, PADDED)[None, :]
    p_block = p_head + index.to(tl.int64) * (BLOCK * DIM) + o_slot * DIM + o_dim
    if BLOCK == WIDTH and DIM == PADDED:
        return tl.load(p_block)
    return tl.load(p_block, mask=(o_slot < BLOCK) & (o_dim < DIM), other=0.0)


@triton.jit
def old_count(last, first_kept, n_index):
    """Returns how many indices hold the blocks before ``last``."""
    return tl.minimum(tl.maximum(last - first_kept + 1, tl.minimum(last, 1)), n_index)
