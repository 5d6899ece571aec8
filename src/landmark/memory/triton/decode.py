"""Two kernels for few queries: score the landmarks of a memory once for all heads of a group, then choose and read.

No program sorts while it scores: it writes each score and the best of each ``CHUNK``. The ``KEPT`` best of all lie in
the ``KEPT`` chunks whose own best are highest, so that a head's choice looks at few numbers, whatever the length. What
is chosen, the own block and each local block are *items*, a program each; the last to arrive joins a query's items in
their order, so that the sum is the same in every run.

Names are those of ``kernels.py``. Queries ``(B, G, R, W)`` are numbered in that order; there is one own block a row.
"""

import triton
import triton.language as tl

from landmark.memory.triton.kernels import ALIGNED, NOWHERE, STRIDES, load_block, old_places, turn
from landmark.ops.triton.primitives import LOG2_E
from landmark.ops.triton.select import NOTHING, best_of, numbers_of, packed

CHUNK = tl.constexpr(64)  # landmarks
JOINED = tl.constexpr(32)  # items at once
# Arguments of the kernels for whose values nothing is compiled anew.
NUMBERS = (
    *STRIDES,
    "groups",
    "repeats",
    "n_width",
    "n_places",
    "n_chunks",
    "n_splits",
    "n_each",
    "n_items",
    "first_stored",
    "most",
)


@triton.jit
def score_recent(
    p_row, p_mark, p_cos, p_sin, p_recent, own, first, first_stored, lowest, scale,
    DIM: tl.constexpr, PADDED: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr,
    KEPT: tl.constexpr, RECENT: tl.constexpr, KEEP_FIRST: tl.constexpr,
):  # fmt: skip
    """Packed scores (KEPT,) of one query and the latest ``RECENT`` candidates, each at its own distance."""
    o_kept, o_dim = tl.arange(0, KEPT), tl.arange(0, PADDED)
    block = first - 1 - o_kept
    candidate = (o_kept < RECENT) & (block >= 0) & ((block >= lowest) | (KEEP_FIRST & (block == 0)))
    place = tl.where(block == 0, 0, block - first_stored + 1)
    p_rows, distance = p_row + tl.zeros((KEPT, 1), tl.int32), tl.where(candidate, own - block, 0)[:, None]
    query = turn(p_rows, candidate[:, None], p_cos, p_sin, distance, scale, DIM, PADDED, TURNED, PAIRS)
    p_marks = p_mark + place.to(tl.int64)[:, None] * DIM + o_dim[None, :]
    mark = tl.load(p_marks, mask=candidate[:, None] & (o_dim < DIM)[None, :], other=0.0).to(tl.float32)
    tl.store(p_recent + o_kept, packed(tl.sum(query * mark, axis=1), place, candidate))


@triton.jit(do_not_specialize=NUMBERS)
def score_kernel(
    p_query, p_mark, p_cos, p_sin, p_own, p_first, p_score, p_peak, p_recent, p_arrived,
    query_batch, query_group, query_repeat, query_place, mark_batch, mark_group,
    groups, repeats, n_width, n_places, n_chunks, n_splits, n_each, first_stored, most, scale,
    DIM: tl.constexpr, PADDED: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, KEPT: tl.constexpr, RECENT: tl.constexpr, EQUAL: tl.constexpr, KEEP_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the landmarks of one row and key/value head, for all its queries; candidates as in ``choice_kernel``.

    Each of ``n_splits`` programs walks over ``n_each`` chunks. A further one for each query scores the latest
    ``RECENT`` candidates at their own distances. Also sets what has arrived of each query to 0.
    """
    n_queries = repeats * n_width
    n_recent = n_queries if RECENT > 0 else 0
    n_programs = n_splits + n_recent
    i_split, i_head = tl.program_id(0) % n_programs - n_recent, (tl.program_id(0) // n_programs).to(tl.int64)
    i_row = i_head // groups
    p_query += i_row * query_batch + i_head % groups * query_group
    p_mark += tl.multiple_of(i_row * mark_batch + i_head % groups * mark_group, ALIGNED)
    own, first = tl.load(p_own + i_row).to(tl.int32), tl.load(p_first + i_row).to(tl.int32)
    lowest, o_dim = first - most, tl.arange(0, PADDED)
    if i_split >= 0:
        last, n_old = first - RECENT, old_places(first - RECENT, first_stored, n_places)
        o_query = tl.arange(0, ROWS)
        inside = o_query < n_queries
        if i_split == 0:
            tl.store(p_arrived + i_head * n_queries + o_query, 0, mask=inside)
        p_rows = p_query + ((o_query // n_width) * query_repeat + (o_query % n_width) * query_place)[:, None]
        distance = own + (RECENT + 1 - first if RECENT > 0 else 0)
        query = turn(p_rows, inside[:, None], p_cos, p_sin, distance, scale, DIM, PADDED, TURNED, PAIRS)
        if EQUAL:
            mark = tl.load(p_mark + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
            same = tl.sum(query * mark[None, :], axis=1)[:, None]
        if PRECISION == "parts":
            high = query.to(tl.bfloat16)
            middle = (query - high.to(tl.float32)).to(tl.bfloat16)
            low = (query - high.to(tl.float32) - middle.to(tl.float32)).to(tl.bfloat16)
        begin = i_split * n_each
        for i_chunk in range(begin, tl.minimum(begin + n_each, tl.cdiv(n_old, CHUNK))):
            place = i_chunk * CHUNK + tl.arange(0, CHUNK)
            if EQUAL:
                scores = same + tl.zeros((ROWS, CHUNK), tl.float32)
            else:
                p_marks = p_mark + place.to(tl.int64)[:, None] * DIM + o_dim[None, :]
                mark = tl.load(p_marks, mask=(place < n_old)[:, None] & (o_dim < DIM)[None, :], other=0.0)
                if PRECISION == "parts":
                    scores = tl.dot(low, tl.trans(mark))
                    scores = tl.dot(middle, tl.trans(mark), scores)
                    scores = tl.dot(high, tl.trans(mark), scores)
                else:
                    scores = tl.dot(query, tl.trans(mark.to(tl.float32)), input_precision=PRECISION)
            block = tl.where(place == 0, 0, place + first_stored - 1)
            candidate = (place < n_old) & (block < last) & ((block >= lowest) | (KEEP_FIRST & (block == 0)))
            scores = tl.where(candidate[None, :], scores, float("-inf"))
            o_score = (i_head * n_queries + o_query)[:, None] * (n_chunks * CHUNK) + place[None, :]
            tl.store(p_score + o_score, scores, mask=inside[:, None])
            peak = tl.max(packed(scores, place[None, :], candidate[None, :]), axis=1)
            tl.store(p_peak + (i_head * n_queries + o_query) * n_chunks + i_chunk, peak, mask=inside)
    else:
        i_query = i_split + n_queries
        p_row = p_query + (i_query // n_width) * query_repeat + (i_query % n_width) * query_place
        p_recent += (i_head * n_queries + i_query) * KEPT
        score_recent(
            p_row, p_mark, p_cos, p_sin, p_recent, own, first, first_stored, lowest, scale,
            DIM, PADDED, TURNED, PAIRS, KEPT, RECENT, KEEP_FIRST,
        )  # fmt: skip


@triton.jit
def best_places(
    p_score, p_peak, p_recent, i_query, n_old, n_chunks,
    TOP_K: tl.constexpr, KEPT: tl.constexpr, RECENT: tl.constexpr, PEAKS: tl.constexpr,
):  # fmt: skip
    """The ``TOP_K`` places (KEPT,) of highest score of a query, ascending, ``NOWHERE`` for none.

    With as few chunks as ``KEPT``, ``PEAKS`` is ``KEPT`` and all of them are looked at.
    """
    o_kept, n_used = tl.arange(0, KEPT), tl.cdiv(n_old, CHUNK)
    chunk = o_kept
    if PEAKS > KEPT:
        peaks = tl.full((1, KEPT), NOTHING, tl.int64)
        for i_chunk in range(0, n_used, PEAKS):
            o_chunk = i_chunk + tl.arange(0, PEAKS)
            p_peaks = p_peak + i_query * n_chunks + o_chunk
            found = tl.load(p_peaks, mask=o_chunk < n_used, other=NOTHING)
            peaks = best_of(peaks, found[None, :], 1, KEPT)
        chunk = tl.reshape(numbers_of(peaks, NOWHERE), (KEPT,)) // CHUNK
    place = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    p_scores = p_score + i_query * n_chunks * CHUNK + place
    scores = tl.load(p_scores, mask=(chunk < n_used)[:, None], other=float("-inf"))
    order = tl.reshape(packed(scores, place, scores > float("-inf")), (1, KEPT * CHUNK))
    best = tl.full((1, KEPT), NOTHING, tl.int64)
    if RECENT > 0:
        best = tl.load(p_recent + i_query * KEPT + o_kept)[None, :]
    best = tl.topk(tl.reshape(tl.join(best, tl.topk(order, KEPT)), (1, 2 * KEPT)), KEPT)
    best = tl.where((o_kept < TOP_K)[None, :], best, NOTHING)
    return tl.reshape(tl.sort(numbers_of(best, NOWHERE)), (KEPT,))


@triton.jit(do_not_specialize=NUMBERS)
def best_kernel(
    p_score, p_peak, p_recent, p_first, p_chosen,
    groups, repeats, n_width, n_places, n_chunks, first_stored,
    TOP_K: tl.constexpr, KEPT: tl.constexpr, RECENT: tl.constexpr, PEAKS: tl.constexpr,
):  # fmt: skip
    """What ``read_kernel`` chooses, alone: the places of a query's blocks, -1 for none."""
    i_query, o_kept = tl.program_id(0).to(tl.int64), tl.arange(0, KEPT)
    first = tl.load(p_first + i_query // (groups * repeats * n_width)).to(tl.int32)
    n_old = old_places(first - RECENT, first_stored, n_places)
    places = best_places(p_score, p_peak, p_recent, i_query, n_old, n_chunks, TOP_K, KEPT, RECENT, PEAKS)
    places = tl.where(places == NOWHERE, -1, places)
    tl.store(p_chosen + i_query * TOP_K + o_kept, places, mask=o_kept < TOP_K)


@triton.jit(do_not_specialize=NUMBERS)
def read_kernel(
    p_query, p_key, p_value, p_far_key, p_far_value, p_frame, p_cos, p_sin, p_own, p_first, p_offset,
    p_score, p_peak, p_recent, p_part, p_lse, p_arrived, p_chosen, p_gate, p_result,
    query_batch, query_group, query_repeat, query_place, store_batch, store_group, far_batch, far_group,
    groups, repeats, n_width, n_places, n_chunks, n_items, first_stored, scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, TURNED: tl.constexpr,
    PAIRS: tl.constexpr, TOP_K: tl.constexpr, KEPT: tl.constexpr, RECENT: tl.constexpr, STINGY: tl.constexpr,
    PEAKS: tl.constexpr, ITEMS: tl.constexpr, FETCHED: tl.constexpr,
):  # fmt: skip
    """Attention of a query to one item; the last item to arrive joins them all.

    Item ``i < TOP_K`` is the query's ``i``-th chosen block, ``TOP_K`` the own block, ``TOP_K + j`` the ``j``-th before
    it. With ``FETCHED`` the choice is given and lies in the ``far`` keys and values, and ``p_frame`` says where the
    items lie; otherwise it is made here and written, and frames are places.
    """
    n_queries = tl.num_programs(0) // n_items  # of all rows; those items that choose first, as they take longest
    i_item, i_query = tl.program_id(0) // n_queries, (tl.program_id(0) % n_queries).to(tl.int64)
    i_place, i_head = i_query % n_width, i_query // (n_width * repeats)
    i_row = i_head // groups
    own, first = tl.load(p_own + i_row).to(tl.int32), tl.load(p_first + i_row).to(tl.int32)
    o_slot, o_dim, o_kept = tl.arange(0, WIDTH), tl.arange(0, PADDED), tl.arange(0, KEPT)

    block = own - (i_item - TOP_K)
    there = (block == own) | (block >= first)
    distance, frame = own - block, tl.maximum(block - first_stored + 1, 0)
    if i_item < TOP_K:
        if FETCHED:
            places = tl.load(p_chosen + i_query * TOP_K + o_kept, mask=o_kept < TOP_K, other=-1).to(tl.int32)
            places = tl.where(places < 0, NOWHERE, places)
        else:
            n_old = old_places(first - RECENT, first_stored, n_places)
            places = best_places(p_score, p_peak, p_recent, i_query, n_old, n_chunks, TOP_K, KEPT, RECENT, PEAKS)
            if i_item == 0:
                found = tl.where(places == NOWHERE, -1, places)
                tl.store(p_chosen + i_query * TOP_K + o_kept, found, mask=o_kept < TOP_K)
        n_chosen = tl.sum((places != NOWHERE).to(tl.int32), axis=0)
        there = i_item < n_chosen
        frame = tl.sum(tl.where((o_kept == i_item) & (places != NOWHERE), places, 0), axis=0)
        block = tl.where(frame == 0, 0, frame + first_stored - 1)
        distance = own - block
        if STINGY:
            recent = (first - 1 - block < TOP_K).to(tl.int32)
            distance = TOP_K + 1 + own - first - (i_item + TOP_K - n_chosen + recent)
    head = tl.multiple_of(i_row * store_batch + i_head % groups * store_group, ALIGNED)
    far = tl.multiple_of(i_row * far_batch + i_head % groups * far_group, ALIGNED)
    p_keys, p_values = p_key + head, p_value + head
    if FETCHED:
        frame = tl.load(p_frame + i_query * n_items + i_item)
        if i_item < TOP_K:
            p_keys, p_values = p_far_key + far, p_far_value + far
    frame, distance = tl.where(there, frame, 0), tl.where(there, distance, 0)

    key = load_block(p_keys, frame, BLOCK, DIM, PADDED, WIDTH)
    value = load_block(p_values, frame, BLOCK, DIM, PADDED, WIDTH)
    p_row = p_query + i_row * query_batch + i_head % groups * query_group
    p_row += i_query // n_width % repeats * query_repeat + i_place * query_place + tl.zeros((1, 1), tl.int32)
    whole = tl.full((1, 1), True, tl.int1)
    query = turn(p_row, whole, p_cos, p_sin, distance, scale, DIM, PADDED, TURNED, PAIRS)
    text = tl.sum(key.to(tl.float32) * query.to(key.dtype).to(tl.float32), axis=1) * LOG2_E
    mark = tl.sum(tl.where(o_slot == BLOCK - 1, text, 0.0), axis=0)
    offset = tl.load(p_offset + i_row * n_width + i_place).to(tl.int32)
    seen = (o_slot < BLOCK - 1) & ((i_item != TOP_K) | (o_slot <= offset))
    text = tl.where(seen, text, float("-inf"))
    peak = tl.max(text, axis=0)
    weights = tl.exp2(text - peak)
    total = tl.sum(weights, axis=0)
    out = tl.sum(weights[:, None] * value.to(tl.float32), axis=0) / total
    lse = tl.where(there, tl.where(i_item == TOP_K, peak + tl.log2(total), mark), float("-inf"))

    p_part, p_lse = p_part + i_query * n_items * DIM, p_lse + i_query * n_items
    tl.store(p_part + i_item * DIM + o_dim, out, mask=o_dim < DIM)
    tl.store(p_lse + i_item, lse)
    tl.debug_barrier()
    if tl.atomic_add(p_arrived + i_query, 1, sem="acq_rel", scope="gpu") == n_items - 1:
        o_item = tl.arange(0, ITEMS)
        every = tl.load(p_lse + o_item, mask=o_item < n_items, other=float("-inf"), cache_modifier=".cg")
        highest = tl.max(every, axis=0)
        gates = tl.exp2(every - highest)
        mass = tl.sum(gates, axis=0)
        tl.store(p_gate + i_query * TOP_K + o_item, gates / mass, mask=o_item < TOP_K)
        joined = tl.zeros((PADDED,), tl.float32)
        for i_first in range(0, n_items, JOINED):
            o_part = i_first + tl.arange(0, JOINED)
            gate = tl.exp2(
                tl.load(p_lse + o_part, mask=o_part < n_items, other=float("-inf"), cache_modifier=".cg") - highest
            )
            p_parts, inside = p_part + o_part[:, None] * DIM + o_dim[None, :], (o_part < n_items)[:, None]
            part = tl.load(p_parts, mask=inside & (o_dim < DIM)[None, :], other=0.0, cache_modifier=".cg")
            joined += tl.sum(gate[:, None] * part, axis=0)
        result = (joined / mass).to(p_result.dtype.element_ty)
        tl.store(p_result + i_query * DIM + o_dim, result, mask=o_dim < DIM)
