"""Work and traffic of landmark attention as functions of shapes, to say how far an implementation
is from the machine.

Counted is what the definition needs, on a regular grid without padding: a product for each visible
query and key, each operand read once. What an implementation does beyond that is its own loss.
"""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Floating point operations (an addition and a product are two) and bytes to and from
    memory.
    """

    flops: int
    bytes: int


class Pairs(NamedTuple):
    """Visible (query, key) pairs of one row and head: own text, past landmarks, and text of the
    past blocks read.
    """

    own: int
    marks: int
    past: int


def visible_pairs(
    queries: int,
    keys: int,
    *,
    block_size: int,
    top_k: int | None = None,
    query_start: int | None = None,
) -> Pairs:
    """Counts pairs for ``queries`` queries from slot ``query_start`` (``keys - queries`` by
    default) on.
    """
    start = keys - queries if query_start is None else query_start
    own = marks = past = 0
    for slot in range(start, start + queries):
        block, place = divmod(slot, block_size)
        before = min(block, keys // block_size)
        own += max(0, min(place + 1, block_size - 1, keys - block * block_size))
        marks += before
        past += (before if top_k is None else min(before, top_k)) * (block_size - 1)
    return Pairs(own, marks, past)


def forward_cost(
    rows: int,
    heads: int,
    groups: int,
    queries: int,
    keys: int,
    dim: int,
    *,
    block_size: int,
    top_k: int | None = None,
    query_start: int | None = None,
    element_bytes: int = 2,
) -> Cost:
    """Cost of the output and its log-sum-exp (float32).

    Args:
        rows: B.
        heads: H, query heads.
        groups: G, key/value heads.
        queries: T.
        keys: S.
        dim: D.
        block_size: slots of a block, landmark included.
        top_k: as for ``landmark_attention``; blocks that several queries choose are counted as read
            once for each, up to all text.
        query_start: as for ``landmark_attention``.
        element_bytes: bytes of a number in the inputs.
    """
    pairs = visible_pairs(
        queries, keys, block_size=block_size, top_k=top_k, query_start=query_start
    )
    products = 2 * (pairs.own + pairs.past) + pairs.marks
    blocks = keys // block_size
    text = keys - blocks
    if top_k is not None:
        text = min(text, (pairs.own + pairs.past) * (heads // groups))
    keys_and_values = groups * (blocks + 2 * text)
    traffic = (
        element_bytes * rows * dim * (2 * heads * queries + keys_and_values)
        + 4 * rows * heads * queries
    )
    return Cost(2 * rows * heads * dim * products, traffic)


def backward_cost(
    rows: int,
    heads: int,
    groups: int,
    queries: int,
    keys: int,
    dim: int,
    *,
    block_size: int,
    top_k: int | None = None,
    query_start: int | None = None,
    element_bytes: int = 2,
) -> Cost:
    """Cost of the three gradients, the scores computed again; arguments as for ``forward_cost``.

    Five products for each pair of a query and a text key (scores, values with the gradient, and one
    for each gradient), three for a landmark. Queries, output, its gradient and the query's gradient
    pass once, keys and values twice.
    """
    pairs = visible_pairs(
        queries, keys, block_size=block_size, top_k=top_k, query_start=query_start
    )
    products = 5 * (pairs.own + pairs.past) + 3 * pairs.marks
    forward = forward_cost(
        rows,
        heads,
        groups,
        queries,
        keys,
        dim,
        block_size=block_size,
        top_k=top_k,
        query_start=query_start,
        element_bytes=element_bytes,
    )
    return Cost(2 * rows * heads * dim * products, 2 * forward.bytes)
