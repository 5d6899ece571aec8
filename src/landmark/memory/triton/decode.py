"""Three kernels for few queries: score the landmarks of a memory once for all heads of a group,
choose, and read.

Where blocks are read as they lie, ``read_kernel`` chooses as well; ``best_kernel`` runs where they
are fetched first.

No program chooses while it scores: it writes each score and the best of each ``CHUNK``. The
``KEPT`` best of all lie in the ``KEPT`` chunks whose own best are highest, so that a head's choice
looks at few numbers, whatever the length. Those are not sorted either: counting how many reach a
bound finds the one that just the best reach. What is chosen, the own block and each local block are
*items*, a program each; the last to arrive joins a query's items in their order, so that the sum is
the same in every run.

Names are those of ``kernels.py``. Queries ``(B, G, R, W)`` are numbered in that order; there is one
own block a row.
"""

import triton
import triton.language as tl

from landmark.memory.triton.prefill import (
    ALIGNED,
    STRIDES,
    load_block,
    load_queries,
    load_turn,
    old_places,
    turn,
)
from landmark.ops.triton.primitives import LOG2_E

CHUNK = tl.constexpr(64)  # landmarks
JOINED = tl.constexpr(32)  # items at once
LOWEST = tl.constexpr(-0x7F800000)  # of a finite score, as ``ordered``
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
def latest(first, first_stored, KEPT: tl.constexpr, RECENT: tl.constexpr):
    """The latest ``RECENT`` blocks before ``first``, ascending, and their places (KEPT,)."""
    block = first - RECENT + tl.arange(0, KEPT)
    return block, tl.where(block == 0, 0, block - first_stored + 1)


@triton.jit
def score_recent(
    p_row,
    p_mark,
    p_cos,
    p_sin,
    p_recent,
    own,
    first,
    first_stored,
    lowest,
    scale,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    KEPT: tl.constexpr,
    RECENT: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
):
    """Scores (KEPT,) of one query and the latest ``RECENT`` candidates, each at its own distance;
    -inf for none.
    """
    o_kept = tl.arange(0, KEPT)
    o_dim = tl.arange(0, PADDED)
    block, place = latest(first, first_stored, KEPT, RECENT)
    candidate = (o_kept < RECENT) & (block >= 0) & ((block >= lowest) | (KEEP_FIRST & (block == 0)))
    p_rows = p_row + tl.zeros((KEPT, 1), tl.int32)
    distance = tl.where(candidate, own - block, 0)[:, None]
    query = turn(
        p_rows, candidate[:, None], p_cos, p_sin, distance, scale, DIM, PADDED, TURNED, PAIRS
    )
    p_marks = p_mark + place.to(tl.int64)[:, None] * DIM + o_dim[None, :]
    mark = tl.load(p_marks, mask=candidate[:, None] & (o_dim < DIM)[None, :], other=0.0).to(
        tl.float32
    )
    tl.store(p_recent + o_kept, tl.where(candidate, tl.sum(query * mark, axis=1), float("-inf")))


@triton.jit
def parts_of(query):
    """Three parts in bfloat16 whose sum is ``query`` exactly."""
    high = query.to(tl.bfloat16)
    middle = (query - high.to(tl.float32)).to(tl.bfloat16)
    return high, middle, (query - high.to(tl.float32) - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit(do_not_specialize=NUMBERS)
def score_kernel(
    p_query,
    p_mark,
    p_cos,
    p_sin,
    p_own,
    p_first,
    p_score,
    p_peak,
    p_recent,
    p_arrived,
    query_batch,
    query_group,
    query_repeat,
    query_place,
    mark_batch,
    mark_group,
    groups,
    repeats,
    n_width,
    n_places,
    n_chunks,
    n_splits,
    n_each,
    first_stored,
    most,
    scale,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEPT: tl.constexpr,
    RECENT: tl.constexpr,
    EQUAL: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of the landmarks of one row and key/value head, for all its queries; candidates as in
    ``choice_kernel``.

    Each of ``n_splits`` programs walks over ``n_each`` chunks. A further one for each query scores
    the latest ``RECENT`` candidates at their own distances. Also sets what has arrived of each
    query to 0. ``QUERIES`` holds the queries, ``ROWS`` is that or four times as much: landmarks in
    bfloat16 are multiplied with three ``parts`` of them.
    """
    n_queries = repeats * n_width
    n_recent = n_queries if RECENT > 0 else 0
    n_programs = n_splits + n_recent
    i_split = tl.program_id(0) % n_programs - n_recent
    i_head = (tl.program_id(0) // n_programs).to(tl.int64)
    i_row = i_head // groups
    p_query += i_row * query_batch + i_head % groups * query_group
    p_mark += tl.multiple_of(i_row * mark_batch + i_head % groups * mark_group, ALIGNED)
    own = tl.load(p_own + i_row).to(tl.int32)
    first = tl.load(p_first + i_row).to(tl.int32)
    lowest = first - most
    o_dim = tl.arange(0, PADDED)
    if i_split >= 0:
        last = first - RECENT
        n_old = old_places(first - RECENT, first_stored, n_places)
        o_query = tl.arange(0, QUERIES)
        inside = o_query < n_queries
        if i_split == 0:
            tl.store(p_arrived + i_head * n_queries + o_query, 0, mask=inside)
        o_row = tl.arange(0, ROWS) % QUERIES
        part = tl.arange(0, ROWS)[:, None] // QUERIES
        p_rows = (
            p_query + ((o_row // n_width) * query_repeat + (o_row % n_width) * query_place)[:, None]
        )
        distance = own + (RECENT + 1 - first if RECENT > 0 else 0)
        real = (o_row < n_queries)[:, None]
        query = turn(p_rows, real, p_cos, p_sin, distance, scale, DIM, PADDED, TURNED, PAIRS)
        if EQUAL:
            mark = tl.load(p_mark + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
            same = tl.sum(query * mark[None, :], axis=1)[:, None]
        if PRECISION == "parts":
            high, middle, low = parts_of(query)
            if ROWS > QUERIES:  # rows of one product; those of the last quarter are 0
                low = tl.where(part == 2, low, 0.0)
                query = tl.where(part == 0, middle, tl.where(part == 1, high, low))
        begin = i_split * n_each
        for i_chunk in range(begin, tl.minimum(begin + n_each, tl.cdiv(n_old, CHUNK))):
            place = i_chunk * CHUNK + tl.arange(0, CHUNK)
            if EQUAL:
                scores = same + tl.zeros((QUERIES, CHUNK), tl.float32)
            else:
                p_marks = p_mark + place.to(tl.int64)[:, None] * DIM + o_dim[None, :]
                mark = tl.load(
                    p_marks, mask=(place < n_old)[:, None] & (o_dim < DIM)[None, :], other=0.0
                )
                if ROWS > QUERIES:
                    scores = tl.dot(query, tl.trans(mark))
                    scores = tl.sum(tl.reshape(scores, (ROWS // QUERIES, QUERIES, CHUNK)), axis=0)
                elif PRECISION == "parts":
                    scores = tl.dot(low, tl.trans(mark))
                    scores = tl.dot(middle, tl.trans(mark), scores)
                    scores = tl.dot(high, tl.trans(mark), scores)
                else:
                    scores = tl.dot(query, tl.trans(mark.to(tl.float32)), input_precision=PRECISION)
            block = tl.where(place == 0, 0, place + first_stored - 1)
            candidate = (
                (place < n_old) & (block < last) & ((block >= lowest) | (KEEP_FIRST & (block == 0)))
            )
            scores = tl.where(candidate[None, :], scores, float("-inf"))
            o_score = (i_head * n_queries + o_query)[:, None] * (n_chunks * CHUNK) + place[None, :]
            tl.store(p_score + o_score, scores, mask=inside[:, None])
            p_peaks = p_peak + (i_head * n_queries + o_query) * n_chunks + i_chunk
            tl.store(p_peaks, tl.max(scores, axis=1), mask=inside)
    else:
        i_query = i_split + n_queries
        p_row = p_query + (i_query // n_width) * query_repeat + (i_query % n_width) * query_place
        p_recent += (i_head * n_queries + i_query) * KEPT
        score_recent(
            p_row,
            p_mark,
            p_cos,
            p_sin,
            p_recent,
            own,
            first,
            first_stored,
            lowest,
            scale,
            DIM,
            PADDED,
            TURNED,
            PAIRS,
            KEPT,
            RECENT,
            KEEP_FIRST,
        )


@triton.jit
def ordered(score):
    """Integers in the order of float32 scores."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(order):
    """The inverse of ``ordered``."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def reached(earlier, later, bound):
    """How many of both are at least ``bound``."""
    return tl.sum((earlier >= bound).to(tl.int32), axis=0) + tl.sum(
        (later >= bound).to(tl.int32), axis=0
    )


@triton.jit
def best_of(earlier, later, low, high, TOP_K: tl.constexpr):
    """Which of the scores ``earlier`` and ``later``, in order of place, are the ``TOP_K`` best, as
    0 and 1; how many.

    Among equals the first win; ``-inf`` is no score. ``low`` is reached by at least ``TOP_K``, or
    is ``-inf``; none exceeds ``high``. Nothing is sorted: what lies between two bounds is halved
    until just ``TOP_K`` reach the lower.
    """
    low = tl.maximum(ordered(low), LOWEST)
    high = ordered(high) + 1
    n_reached = reached(earlier, later, score_of(low))
    while (n_reached > TOP_K) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # their sum would overflow
        n_middle = reached(earlier, later, score_of(middle))
        enough = n_middle >= TOP_K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        n_reached = tl.where(enough, n_middle, n_reached)
    bound = score_of(low)
    surplus = n_reached - TOP_K
    best_earlier = (earlier >= bound).to(tl.int32)
    best_later = (later >= bound).to(tl.int32)
    if surplus > 0:  # the last of those that equal the bound
        same_earlier = (earlier == bound).to(tl.int32)
        same_later = (later == bound).to(tl.int32)
        n_earlier = tl.sum(same_earlier, axis=0)
        n_later = tl.sum(same_later, axis=0)
        n_same = n_earlier + n_later - surplus
        best_earlier -= same_earlier * (tl.cumsum(same_earlier, axis=0) > n_same).to(tl.int32)
        best_later -= same_later * (n_earlier + tl.cumsum(same_later, axis=0) > n_same).to(tl.int32)
    return best_earlier, best_later, tl.minimum(n_reached, TOP_K)


@triton.jit
def best_chunks(p_peak, n_used, n_chunks, KEPT: tl.constexpr, PEAKS: tl.constexpr):
    """The chunks (KEPT,) of the highest of ``n_used`` peaks, ascending, then numbers from
    ``n_used`` on.
    """
    o_kept = tl.arange(0, KEPT)
    chunk = o_kept
    for i_chunk in range(0, n_chunks, PEAKS):
        o_chunk = i_chunk + tl.arange(0, PEAKS)
        before = tl.load(p_peak + chunk, mask=chunk < i_chunk, other=float("-inf"))
        found = tl.load(p_peak + o_chunk, mask=o_chunk < n_chunks, other=float("-inf"))
        found = tl.where(o_chunk < n_used, found, float("-inf"))
        groups = tl.max(tl.reshape(found, (PEAKS // KEPT, KEPT)), axis=0)
        high = tl.max(tl.maximum(groups, before), axis=0)
        stays, passes, _ = best_of(before, found, tl.min(groups, axis=0), high, KEPT)
        n_stay = tl.sum(stays, axis=0)
        if n_stay > 0:  # of earlier rounds
            stayed = (stays * tl.cumsum(stays, axis=0))[None, :] == o_kept[:, None] + 1
            chunk = tl.sum(tl.where(stayed, chunk[None, :], 0), axis=1)
        smaller = (n_stay + tl.cumsum(passes, axis=0))[None, :] <= o_kept[:, None]
        chunk = tl.where(o_kept < n_stay, chunk, i_chunk + tl.sum(smaller.to(tl.int32), axis=1))
    return chunk


@triton.jit
def best_places(
    p_score,
    p_peak,
    p_recent,
    i_query,
    first,
    first_stored,
    n_places,
    n_chunks,
    TOP_K: tl.constexpr,
    KEPT: tl.constexpr,
    RECENT: tl.constexpr,
    PEAKS: tl.constexpr,
):
    """Where the ``TOP_K`` highest scores of a query are, among those of the best chunks and of the
    latest candidates.

    With as few chunks as ``KEPT``, ``PEAKS`` is ``KEPT`` and all of them are looked at. What was
    not written is hidden after it was loaded, so that no load waits for the count.

    Returns:
        places (KEPT * CHUNK,) and their ranks among the chosen, by place, -1 for those that are not
        chosen; the same (KEPT,) of the latest candidates; how many are chosen.
    """
    o_kept = tl.arange(0, KEPT)
    n_used = tl.cdiv(old_places(first - RECENT, first_stored, n_places), CHUNK)
    recent = tl.full((KEPT,), float("-inf"), tl.float32)
    if RECENT > 0:
        recent = tl.load(p_recent + i_query * KEPT + o_kept)
    chunk = o_kept
    if PEAKS > KEPT:
        chunk = best_chunks(p_peak + i_query * n_chunks, n_used, n_chunks, KEPT, PEAKS)
    place = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    p_scores = p_score + i_query * n_chunks * CHUNK + place
    scores = tl.load(p_scores, mask=(chunk < n_chunks)[:, None], other=float("-inf"))
    scores = tl.where((chunk < n_used)[:, None], scores, float("-inf"))
    groups = tl.max(scores, axis=1)
    low = tl.min(groups, axis=0)
    high = tl.maximum(tl.max(groups, axis=0), tl.max(recent, axis=0))
    if low == float("-inf"):  # fewer chunks than ``KEPT``
        low = tl.min(tl.max(tl.reshape(scores, (CHUNK, KEPT)), axis=0), axis=0)
    scores = tl.reshape(scores, (KEPT * CHUNK,))
    place = tl.reshape(place, (KEPT * CHUNK,))
    best, best_recent, n_chosen = best_of(scores, recent, low, high, TOP_K)
    n_old = n_chosen - tl.sum(best_recent, axis=0)
    _, place_recent = latest(first, first_stored, KEPT, RECENT)
    rank = tl.where(best > 0, tl.cumsum(best, axis=0) - 1, -1)
    rank_recent = tl.where(best_recent > 0, n_old + tl.cumsum(best_recent, axis=0) - 1, -1)
    return place, rank, place_recent, rank_recent, n_chosen


@triton.jit
def store_places(p_chosen, choice, TOP_K: tl.constexpr, KEPT: tl.constexpr):
    """Writes what ``best_places`` gave in ascending order, -1 for none."""
    place, rank, place_recent, rank_recent, n_chosen = choice
    tl.store(p_chosen + rank, place, mask=rank >= 0)
    tl.store(p_chosen + rank_recent, place_recent, mask=rank_recent >= 0)
    o_kept = tl.arange(0, KEPT)
    tl.store(p_chosen + o_kept, -1, mask=(o_kept >= n_chosen) & (o_kept < TOP_K))


@triton.jit(do_not_specialize=NUMBERS)
def best_kernel(
    p_score,
    p_peak,
    p_recent,
    p_first,
    p_chosen,
    groups,
    repeats,
    n_width,
    n_places,
    n_chunks,
    first_stored,
    TOP_K: tl.constexpr,
    KEPT: tl.constexpr,
    RECENT: tl.constexpr,
    PEAKS: tl.constexpr,
):
    """What ``read_kernel`` chooses, alone: the places of a query's blocks, -1 for none."""
    i_query = tl.program_id(0).to(tl.int64)
    first = tl.load(p_first + i_query // (groups * repeats * n_width)).to(tl.int32)
    choice = best_places(
        p_score,
        p_peak,
        p_recent,
        i_query,
        first,
        first_stored,
        n_places,
        n_chunks,
        TOP_K,
        KEPT,
        RECENT,
        PEAKS,
    )
    store_places(p_chosen + i_query * TOP_K, choice, TOP_K, KEPT)


@triton.jit
def load_parts(p_part, p_lse, i_first, n_items, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Log-sum-exps (JOINED,) and outputs (JOINED, PADDED) of a query's items from ``i_first``
    on.
    """
    o_part = i_first + tl.arange(0, JOINED)
    o_dim = tl.arange(0, PADDED)
    inside = o_part < n_items
    lse = tl.load(p_lse + o_part, mask=inside, other=float("-inf"), cache_modifier=".cg")
    p_parts = p_part + o_part[:, None] * DIM + o_dim[None, :]
    mask = inside[:, None] & (o_dim < DIM)[None, :]
    return lse, tl.load(p_parts, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def join(
    p_part,
    p_lse,
    p_gate,
    p_result,
    n_items,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """CacheWrites a query's gate weights of what it chose, and its output."""
    o_item = tl.arange(0, ITEMS)
    o_dim = tl.arange(0, PADDED)
    lse, part = load_parts(p_part, p_lse, 0, n_items, DIM, PADDED)
    every = tl.load(
        p_lse + o_item, mask=o_item < n_items, other=float("-inf"), cache_modifier=".cg"
    )
    highest = tl.max(every, axis=0)
    gates = tl.exp2(every - highest)
    mass = tl.sum(gates, axis=0)
    tl.store(p_gate + o_item, gates / mass, mask=o_item < TOP_K)
    joined = tl.sum(tl.exp2(lse - highest)[:, None] * part, axis=0)
    for i_first in range(JOINED, n_items, JOINED):
        lse, part = load_parts(p_part, p_lse, i_first, n_items, DIM, PADDED)
        joined += tl.sum(tl.exp2(lse - highest)[:, None] * part, axis=0)
    tl.store(p_result + o_dim, (joined / mass).to(p_result.dtype.element_ty), mask=o_dim < DIM)


@triton.jit(do_not_specialize=NUMBERS)
def read_kernel(
    p_query,
    p_key,
    p_value,
    p_far_key,
    p_far_value,
    p_frame,
    p_cos,
    p_sin,
    p_own,
    p_first,
    p_offset,
    p_score,
    p_peak,
    p_recent,
    p_part,
    p_lse,
    p_arrived,
    p_chosen,
    p_gate,
    p_result,
    query_batch,
    query_group,
    query_repeat,
    query_place,
    store_batch,
    store_group,
    far_batch,
    far_group,
    groups,
    n_width,
    n_places,
    n_chunks,
    n_items,
    first_stored,
    scale,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TURNED: tl.constexpr,
    PAIRS: tl.constexpr,
    TOP_K: tl.constexpr,
    KEPT: tl.constexpr,
    RECENT: tl.constexpr,
    STINGY: tl.constexpr,
    PEAKS: tl.constexpr,
    ITEMS: tl.constexpr,
    FETCHED: tl.constexpr,
):
    """Attention of a query to one item; the last item to arrive joins them all.

    Item ``i < TOP_K`` is the query's ``i``-th chosen block, ``TOP_K`` the own block, ``TOP_K + j``
    the ``j``-th before it. With ``FETCHED`` the choice is given and lies in the ``far`` keys and
    values, and ``p_frame`` says where the items lie; otherwise it is made here and written, and
    frames are places. ``p_result`` is (B, W, G, R, D).
    """
    i_item = tl.program_id(2)
    i_head = tl.program_id(1)  # those items that choose first, as they take longest
    i_query = i_head.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    i_repeat = tl.program_id(0) // n_width
    i_place = tl.program_id(0) % n_width
    i_row = (i_head // groups).to(tl.int64)
    i_group = i_head % groups
    own = tl.load(p_own + i_row).to(tl.int32)
    first = tl.load(p_first + i_row).to(tl.int32)
    o_slot = tl.arange(0, WIDTH)
    o_dim = tl.arange(0, PADDED)
    o_kept = tl.arange(0, KEPT)
    p_row = (
        p_query
        + i_row * query_batch
        + i_group * query_group
        + i_repeat * query_repeat
        + i_place * query_place
    )
    whole = tl.full((1, 1), True, tl.int1)
    query, partner = load_queries(
        p_row + tl.zeros((1, 1), tl.int32), whole, DIM, PADDED, TURNED, PAIRS
    )
    offset = tl.load(p_offset + i_row * n_width + i_place).to(tl.int32)

    if i_item < TOP_K:
        if FETCHED:
            places = tl.load(p_chosen + i_query * TOP_K + o_kept, mask=o_kept < TOP_K, other=-1).to(
                tl.int32
            )
            n_chosen = tl.sum((places >= 0).to(tl.int32), axis=0)
            frame = tl.sum(tl.where((o_kept == i_item) & (places >= 0), places, 0), axis=0)
        else:
            choice = best_places(
                p_score,
                p_peak,
                p_recent,
                i_query,
                first,
                first_stored,
                n_places,
                n_chunks,
                TOP_K,
                KEPT,
                RECENT,
                PEAKS,
            )
            place, rank, place_recent, rank_recent, n_chosen = choice
            if i_item == 0:
                store_places(p_chosen + i_query * TOP_K, choice, TOP_K, KEPT)
            frame = tl.sum(tl.where(rank == i_item, place, 0), axis=0)
            frame += tl.sum(tl.where(rank_recent == i_item, place_recent, 0), axis=0)
        there = i_item < n_chosen
        block = tl.where(frame == 0, 0, frame + first_stored - 1)
        distance = own - block
        if STINGY:
            recent = (first - 1 - block < TOP_K).to(tl.int32)
            distance = TOP_K + 1 + own - first - (i_item + TOP_K - n_chosen + recent)
    else:
        block = own - (i_item - TOP_K)
        there = (block == own) | (block >= first)
        distance = own - block
        frame = tl.maximum(block - first_stored + 1, 0)
    head = tl.multiple_of(i_row * store_batch + i_group.to(tl.int64) * store_group, ALIGNED)
    far = tl.multiple_of(i_row * far_batch + i_group.to(tl.int64) * far_group, ALIGNED)
    p_keys = p_key + head
    p_values = p_value + head
    if FETCHED:
        frame = tl.load(p_frame + i_query * n_items + i_item)
        if i_item < TOP_K:
            p_keys = p_far_key + far
            p_values = p_far_value + far
    frame = tl.where(there, frame, 0)
    distance = tl.where(there, distance, 0)

    # Those of few numbers first: Triton lays out a product as what was loaded last.
    cos, sin = load_turn(p_cos, p_sin, distance, PADDED, TURNED)
    key = load_block(p_keys, frame, BLOCK, DIM, PADDED, WIDTH)
    value = load_block(p_values, frame, BLOCK, DIM, PADDED, WIDTH)
    query = (query * cos + partner * sin) * scale
    text = tl.sum(key.to(tl.float32) * query.to(key.dtype).to(tl.float32), axis=1) * LOG2_E
    mark = tl.sum(tl.where(o_slot == BLOCK - 1, text, 0.0), axis=0)
    seen = (o_slot < BLOCK - 1) & ((i_item != TOP_K) | (o_slot <= offset))
    text = tl.where(seen, text, float("-inf"))
    peak = tl.max(text, axis=0)
    weights = tl.exp2(text - peak)
    total = tl.sum(weights, axis=0)
    out = tl.sum(weights[:, None] * value.to(tl.float32), axis=0) / total
    lse = tl.where(there, tl.where(i_item == TOP_K, peak + tl.log2(total), mark), float("-inf"))

    p_part = p_part + i_query * n_items * DIM
    p_lse = p_lse + i_query * n_items
    tl.store(p_part + i_item * DIM + o_dim, out, mask=o_dim < DIM)
    tl.store(p_lse + i_item, lse)
    tl.debug_barrier()
    if tl.atomic_add(p_arrived + i_query, 1, sem="acq_rel", scope="gpu") == n_items - 1:
        i_result = ((i_row * n_width + i_place) * groups + i_group) * (
            tl.num_programs(0) // n_width
        ) + i_repeat
        join(
            p_part,
            p_lse,
            p_gate + i_query * TOP_K,
            p_result + i_result * DIM,
            n_items,
            DIM,
            PADDED,
            TOP_K,
            ITEMS,
        )
