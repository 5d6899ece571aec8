"""Three kernels of a call: choose blocks, attend to what an own block's queries share, attend to
what each one chose.

Queries lie on the grid (B, G, R, n, W) of ``memory/geometry.py``; keys hold their position inside
their block only, so a query is turned by its distance, in blocks, to wherever a block is thought to
stand. Scores are in units of log2.

``p_`` pointer, ``i_`` index, ``o_`` offsets, ``n_`` count. Constants: ``BLOCK`` the block size,
``WIDTH`` the power of two that holds it, ``DIM`` the head dim, ``PADDED`` the power of two that
holds that, ``TURNED`` how many columns turn, ``PAIRS`` whether adjacent columns turn together (else
halves).
"""

import triton
import triton.language as tl

from landmark.ops.triton.primitives import LOG2_E, LOWEST
from landmark.ops.triton.select import NOTHING, best_of, numbers_of, packed

NOWHERE = tl.constexpr(2**31 - 1)
ALIGNED = tl.constexpr(8)  # numbers: every head dim is a multiple
# Where heads of the memory begin: nothing is compiled anew when it grows, so that it adds in the
# same order.
STRIDES = ("mark_batch", "mark_group", "store_batch", "store_group", "far_batch", "far_group")
# Arguments of the kernels for whose values nothing is compiled anew.
NUMBERS = (
    *STRIDES,
    "groups",
    "repeats",
    "n_own",
    "n_width",
    "n_shared",
    "n_places",
    "n_chosen",
    "first_stored",
    "most",
)


@triton.jit
def own_block(i_program, groups, repeats, n_own, n_tiles):
    """Row, key/value head, query head of it, own block and tile of a program; neighbours read the
    same keys.
    """
    i_tile = i_program % n_tiles
    i_rest = i_program // n_tiles
    i_repeat = i_rest % repeats
    i_rest = i_rest // repeats
    i_own = i_rest % n_own
    i_rest = i_rest // n_own
    return i_rest // groups, i_rest % groups, i_repeat, i_own, i_tile


@triton.jit
def load_queries(
    p_rows,
    inside,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Queries (rows, PADDED) at ``p_rows`` (rows, 1), and what turns into each of their columns, in
    float32.
    """
    o_dim = tl.arange(0, PADDED)
    o_half = tl.where(o_dim < TURNED // 2, o_dim + TURNED // 2, o_dim - TURNED // 2)
    o_partner = tl.where(o_dim < TURNED, o_dim ^ 1 if PAIRS else o_half, o_dim)
    mask = inside & (o_dim < DIM)[None, :]
    query = tl.load(p_rows + o_dim[None, :], mask=mask, other=0.0).to(tl.float32)
    return query, tl.load(p_rows + o_partner[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_turn(p_cos, p_sin, distance, PADDED: tl.constexpr, TURNED: tl.constexpr):
    """Cosine and signed sine (one or rows, PADDED) of a ``distance`` in blocks, one or (rows,
    1).
    """
    o_dim = tl.arange(0, PADDED)[None, :]
    o_turn = distance * TURNED + o_dim
    cos = tl.load(p_cos + o_turn, mask=o_dim < TURNED, other=1.0)
    return cos, tl.load(p_sin + o_turn, mask=o_dim < TURNED, other=0.0)


@triton.jit
def turn(
    p_rows,
    inside,
    p_cos,
    p_sin,
    distance,
    scale,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Queries (rows, PADDED) at ``p_rows`` (rows, 1), scaled and turned, in float32.

    ``distance``, in blocks, is one for all rows or (rows, 1).
    """
    query, partner = load_queries(p_rows, inside, DIM, PADDED, TURNED, PAIRS)
    cos, sin = load_turn(p_cos, p_sin, distance, PADDED, TURNED)
    return (query * cos + partner * sin) * scale


@triton.jit
def load_block(
    p_head, place, BLOCK: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr
):
    """Keys or values (WIDTH, PADDED) of the block at ``place``; zeros outside."""
    o_slot = tl.arange(0, WIDTH)[:, None]
    o_dim = tl.arange(0, PADDED)[None, :]
    p_block = p_head + place.to(tl.int64) * (BLOCK * DIM) + o_slot * DIM + o_dim
    if BLOCK == WIDTH and DIM == PADDED:
        return tl.load(p_block)
    return tl.load(p_block, mask=(o_slot < BLOCK) & (o_dim < DIM), other=0.0)


@triton.jit
def old_places(last, first_stored, n_places):
    """How many places hold the blocks before ``last``."""
    return tl.minimum(tl.maximum(last - first_stored + 1, tl.minimum(last, 1)), n_places)


@triton.jit(do_not_specialize=NUMBERS)
def choice_kernel(
    p_query,
    p_mark,
    p_cos,
    p_sin,
    p_own,
    p_first,
    p_distance,
    p_chosen,
    query_batch,
    query_group,
    query_repeat,
    query_own,
    query_place,
    mark_batch,
    mark_group,
    groups,
    repeats,
    n_own,
    n_width,
    n_places,
    first_stored,
    most,
    scale,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    MARKS: tl.constexpr,
    TOP_K: tl.constexpr,
    KEPT: tl.constexpr,
    RECENT: tl.constexpr,
    EQUAL: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The ``TOP_K`` places of highest landmark score of each query, ascending, -1 for none.

    All landmarks are scored at one distance, but for the latest ``RECENT`` candidates, which are
    scored at their own. With ``EQUAL`` all landmarks are the same vector. Candidates are the latest
    ``most`` blocks before ``first``, and block 0 with ``KEEP_FIRST``.
    """
    n_tiles = tl.cdiv(n_width, ROWS)
    i_row, i_group, i_repeat, i_own, i_tile = own_block(
        tl.program_id(0), groups, repeats, n_own, n_tiles
    )
    o_place = i_tile * ROWS + tl.arange(0, ROWS)
    inside = (o_place < n_width)[:, None]
    p_rows = (
        p_query + i_row.to(tl.int64) * query_batch + i_group * query_group + i_repeat * query_repeat
    )
    p_rows += i_own.to(tl.int64) * query_own + (o_place * query_place)[:, None]
    p_mark += tl.multiple_of(
        i_row.to(tl.int64) * mark_batch + i_group.to(tl.int64) * mark_group, ALIGNED
    )
    own = tl.load(p_own + i_row * n_own + i_own)
    first = tl.load(p_first + i_row * n_own + i_own)
    lowest = first - most
    o_dim = tl.arange(0, PADDED)
    o_kept = tl.arange(0, KEPT)
    best = tl.full((ROWS, KEPT), NOTHING, tl.int64)

    distance = tl.load(p_distance + i_row * n_own + i_own)
    query = turn(p_rows, inside, p_cos, p_sin, distance, scale, DIM, PADDED, TURNED, PAIRS)
    if EQUAL:
        mark = tl.load(p_mark + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
        same = tl.sum(query * mark[None, :], axis=1)[:, None]
    last = first - RECENT
    n_old = old_places(last, first_stored, n_places)
    for i_place in range(0, n_old, MARKS):
        place = i_place + tl.arange(0, MARKS)
        if EQUAL:
            scores = same + tl.zeros((ROWS, MARKS), tl.float32)
        else:
            p_marks = p_mark + place.to(tl.int64)[:, None] * DIM + o_dim[None, :]
            mark = tl.load(
                p_marks, mask=(place < n_old)[:, None] & (o_dim < DIM)[None, :], other=0.0
            ).to(tl.float32)
            scores = tl.dot(query, tl.trans(mark), input_precision=PRECISION)
        block = tl.where(place == 0, 0, place + first_stored - 1)
        candidate = (
            (place < n_old) & (block < last) & ((block >= lowest) | (KEEP_FIRST & (block == 0)))
        )
        best = best_of(best, packed(scores, place[None, :], candidate[None, :]), ROWS, KEPT)
    if RECENT > 0:
        found = tl.full((ROWS, KEPT), NOTHING, tl.int64)
        for i_recent in range(0, RECENT):
            block = first - 1 - i_recent
            if (block >= 0) & ((block >= lowest) | (KEEP_FIRST & (block == 0))):
                place = tl.where(block == 0, 0, block - first_stored + 1)
                mark = tl.load(
                    p_mark + place.to(tl.int64) * DIM + o_dim, mask=o_dim < DIM, other=0.0
                ).to(tl.float32)
                query = turn(
                    p_rows, inside, p_cos, p_sin, own - block, scale, DIM, PADDED, TURNED, PAIRS
                )
                scores = tl.sum(query * mark[None, :], axis=1)
                here = packed(scores, place, block >= 0)
                found = tl.where((o_kept == i_recent)[None, :], here[:, None], found)
        best = best_of(best, found, ROWS, KEPT)
    places = tl.sort(numbers_of(tl.where((o_kept < TOP_K)[None, :], best, NOTHING), NOWHERE))
    p_chosen += (
        (((i_row * groups + i_group) * repeats + i_repeat).to(tl.int64) * n_own + i_own)
        * n_width
        * TOP_K
    )
    p_chosen += o_place[:, None] * TOP_K + o_kept[None, :]
    tl.store(
        p_chosen, tl.where(places == NOWHERE, -1, places), mask=inside & (o_kept < TOP_K)[None, :]
    )


@triton.jit(do_not_specialize=NUMBERS)
def shared_kernel(
    p_query,
    p_key,
    p_value,
    p_cos,
    p_sin,
    p_own,
    p_offset,
    p_shared,
    p_distance,
    p_part,
    p_lse,
    query_batch,
    query_group,
    query_repeat,
    query_own,
    query_place,
    store_batch,
    store_group,
    groups,
    repeats,
    n_own,
    n_width,
    n_shared,
    scale,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Output and log-sum-exp (to base 2) over the text of the own block and ``n_shared`` past
    blocks of a tile.
    """
    n_tiles = tl.cdiv(n_width, ROWS)
    i_row, i_group, i_repeat, i_own, i_tile = own_block(
        tl.program_id(0), groups, repeats, n_own, n_tiles
    )
    o_place = i_tile * ROWS + tl.arange(0, ROWS)
    inside = (o_place < n_width)[:, None]
    p_rows = (
        p_query + i_row.to(tl.int64) * query_batch + i_group * query_group + i_repeat * query_repeat
    )
    p_rows += i_own.to(tl.int64) * query_own + (o_place * query_place)[:, None]
    head = tl.multiple_of(
        i_row.to(tl.int64) * store_batch + i_group.to(tl.int64) * store_group, ALIGNED
    )
    p_key = p_key + head
    p_value = p_value + head
    dtype = p_key.dtype.element_ty
    i_grid = i_row * n_own + i_own
    o_slot = tl.arange(0, WIDTH)[None, :]
    o_dim = tl.arange(0, PADDED)

    offset = tl.load(p_offset + i_grid * n_width + o_place, mask=o_place < n_width, other=0)
    query = turn(p_rows, inside, p_cos, p_sin, 0, scale, DIM, PADDED, TURNED, PAIRS)
    place = tl.load(p_own + i_grid)
    key = load_block(p_key, place, BLOCK, DIM, PADDED, WIDTH)
    text = tl.dot(query.to(dtype), tl.trans(key), input_precision="ieee") * LOG2_E
    text = tl.where((o_slot <= offset[:, None]) & (o_slot < BLOCK - 1), text, float("-inf"))
    peak = tl.maximum(tl.max(text, axis=1), LOWEST)
    weights = tl.exp2(text - peak[:, None])
    total = tl.sum(weights, axis=1)
    value = load_block(p_value, place, BLOCK, DIM, PADDED, WIDTH)
    out = tl.dot(weights.to(dtype), value, input_precision="ieee")
    for i_shared in range(0, n_shared):
        distance = tl.load(p_distance + i_grid * n_shared + i_shared)
        if distance >= 0:
            place = tl.load(p_shared + i_grid * n_shared + i_shared)
            query = turn(p_rows, inside, p_cos, p_sin, distance, scale, DIM, PADDED, TURNED, PAIRS)
            key = load_block(p_key, place, BLOCK, DIM, PADDED, WIDTH)
            text = tl.dot(query.to(dtype), tl.trans(key), input_precision="ieee") * LOG2_E
            mark = tl.sum(tl.where(o_slot == BLOCK - 1, text, 0.0), axis=1)
            text = tl.where(o_slot < BLOCK - 1, text, float("-inf"))
            weights = tl.exp2(text - tl.max(text, axis=1)[:, None])
            higher = tl.maximum(peak, mark)
            shrink = tl.exp2(peak - higher)
            gate = tl.exp2(mark - higher)
            weights *= (gate / tl.sum(weights, axis=1))[:, None]
            value = load_block(p_value, place, BLOCK, DIM, PADDED, WIDTH)
            out = tl.dot(weights.to(dtype), value, out * shrink[:, None], input_precision="ieee")
            total = total * shrink + gate
            peak = higher
    total = tl.where(total > 0, total, 1.0)  # where no query stands
    o_query = ((i_row * groups + i_group) * repeats + i_repeat).to(tl.int64) * n_own + i_own
    o_query = o_query * n_width + o_place
    mask = inside & (o_dim < DIM)[None, :]
    tl.store(p_part + o_query[:, None] * DIM + o_dim[None, :], out / total[:, None], mask=mask)
    tl.store(p_lse + o_query, peak + tl.log2(total), mask=o_place < n_width)


@triton.jit(do_not_specialize=NUMBERS)
def chosen_kernel(
    p_query,
    p_key,
    p_value,
    p_cos,
    p_sin,
    p_chosen,
    p_distance,
    p_part,
    p_lse,
    p_result,
    p_gate,
    query_batch,
    query_group,
    query_repeat,
    query_own,
    query_place,
    store_batch,
    store_group,
    chosen_batch,
    chosen_group,
    chosen_repeat,
    chosen_own,
    chosen_place,
    chosen_stride,
    distance_batch,
    distance_group,
    distance_repeat,
    distance_own,
    distance_place,
    distance_stride,
    groups,
    repeats,
    n_own,
    n_width,
    n_chosen,
    scale,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Adds the blocks that one query chose to what ``shared_kernel`` left; also their gate
    weights.
    """
    i_row, i_group, i_repeat, i_own, i_place = own_block(
        tl.program_id(0), groups, repeats, n_own, n_width
    )
    p_row = (
        p_query + i_row.to(tl.int64) * query_batch + i_group * query_group + i_repeat * query_repeat
    )
    p_row += i_own.to(tl.int64) * query_own + i_place * query_place + tl.zeros((1, 1), tl.int32)
    p_chosen += (
        i_row.to(tl.int64) * chosen_batch + i_group * chosen_group + i_repeat * chosen_repeat
    )
    p_chosen += i_own.to(tl.int64) * chosen_own + i_place * chosen_place
    p_distance += (
        i_row.to(tl.int64) * distance_batch + i_group * distance_group + i_repeat * distance_repeat
    )
    p_distance += i_own.to(tl.int64) * distance_own + i_place * distance_place
    head = tl.multiple_of(
        i_row.to(tl.int64) * store_batch + i_group.to(tl.int64) * store_group, ALIGNED
    )
    p_key = p_key + head
    p_value = p_value + head
    i_query = ((i_row * groups + i_group) * repeats + i_repeat).to(tl.int64) * n_own + i_own
    i_query = i_query * n_width + i_place
    o_slot = tl.arange(0, WIDTH)
    o_dim = tl.arange(0, PADDED)
    o_kept = tl.arange(0, KEPT)

    out = tl.load(p_part + i_query * DIM + o_dim, mask=o_dim < DIM, other=0.0)
    peak = tl.load(p_lse + i_query)
    total = 1.0
    marks = tl.full((KEPT,), float("-inf"), tl.float32)
    for i_chosen in range(0, n_chosen):
        place = tl.load(p_chosen + i_chosen * chosen_stride)
        distance = tl.load(p_distance + i_chosen * distance_stride)
        inside = (distance >= 0) & tl.full((1, 1), True, tl.int1)
        key = load_block(p_key, tl.maximum(place, 0), BLOCK, DIM, PADDED, WIDTH)
        value = load_block(p_value, tl.maximum(place, 0), BLOCK, DIM, PADDED, WIDTH)
        query = turn(
            p_row, inside, p_cos, p_sin, tl.maximum(distance, 0), scale, DIM, PADDED, TURNED, PAIRS
        )
        query = query.to(key.dtype).to(tl.float32)
        text = tl.sum(key.to(tl.float32) * query, axis=1) * LOG2_E
        mark = tl.sum(tl.where(o_slot == BLOCK - 1, text, 0.0), axis=0)
        mark = tl.where(distance >= 0, mark, float("-inf"))
        text = tl.where(o_slot < BLOCK - 1, text, float("-inf"))
        weights = tl.exp2(text - tl.max(text, axis=0))
        higher = tl.maximum(peak, mark)
        shrink = tl.exp2(peak - higher)
        gate = tl.exp2(mark - higher)
        weights *= gate / tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * value.to(tl.float32), axis=0)
        total = total * shrink + gate
        peak = higher
        marks = tl.where(o_kept == i_chosen, mark, marks)
    result = (out / total).to(p_result.dtype.element_ty)
    tl.store(p_result + i_query * DIM + o_dim, result, mask=o_dim < DIM)
    tl.store(
        p_gate + i_query * n_chosen + o_kept, tl.exp2(marks - peak) / total, mask=o_kept < n_chosen
    )
