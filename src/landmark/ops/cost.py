"""Floating point operations and memory traffic of landmark attention, from shapes alone.

Benchmarks compare an implementation with them. Counted is what the definition needs on a regular
grid without padding: one product for each visible pair of query and key, one read of each operand.
What an implementation does beyond that is its own loss.
"""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Work of a call.

    Attributes:
        flops: floating point operations; a multiplication and an addition are two.
        bytes: bytes read from memory and written to it.
    """

    flops: int
    bytes: int


class Pairs(NamedTuple):
    """Counts of the visible pairs of query and key, of one row and head.

    Attributes:
        own: pairs with text of the query's own block.
        landmarks: pairs with landmarks of past blocks.
        past: pairs with text of the past blocks that are read.
    """

    own: int
    landmarks: int
    past: int


def visible_pairs(
    queries: int,
    keys: int,
    *,
    block_size: int,
    top_k: int | None = None,
    query_start: int | None = None,
) -> Pairs:
    """Counts the visible pairs of queries at consecutive slots.

    Args:
        queries: T.
        keys: S.
        block_size: slots of a block, landmark included.
        top_k: as for ``landmark_attention``.
        query_start: slot of the first query, ``keys - queries`` by default.
    """
    start = keys - queries if query_start is None else query_start
    own = 0
    landmarks = 0
    past = 0
    for slot in range(start, start + queries):
        block, offset = divmod(slot, block_size)
        before = min(block, keys // block_size)
        own += max(0, min(offset + 1, block_size - 1, keys - block * block_size))
        landmarks += before
        past += (before if top_k is None else min(before, top_k)) * (block_size - 1)
    return Pairs(own, landmarks, past)


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
    """Returns the cost of the output and its log-sum-exp (float32).

    Args:
        rows: B.
        heads: H, query heads.
        groups: G, key/value heads.
        queries: T.
        keys: S.
        dim: D.
        block_size: slots of a block, landmark included.
        top_k: as for ``landmark_attention``. A block that several queries select counts as read
            once for each of them, up to all text.
        query_start: as for ``landmark_attention``.
        element_bytes: bytes of a number in the inputs.
    """
    pairs = visible_pairs(
        queries, keys, block_size=block_size, top_k=top_k, query_start=query_start
    )
    products = 2 * (pairs.own + pairs.past) + pairs.landmarks
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
    """Returns the cost of the three gradients, with the scores computed again.

    A pair of a query and a text key takes five products (the scores, the gradient with the values,
    and one for each gradient), a pair with a landmark three. Queries, output, its gradient and the
    query's gradient pass once, keys and values twice. Arguments as for ``forward_cost``.
    """
    pairs = visible_pairs(
        queries, keys, block_size=block_size, top_k=top_k, query_start=query_start
    )
    products = 5 * (pairs.own + pairs.past) + 3 * pairs.landmarks
    forward = forward_cost(
        rows=rows,
        heads=heads,
        groups=groups,
        queries=queries,
        keys=keys,
        dim=dim,
        block_size=block_size,
        top_k=top_k,
        query_start=query_start,
        element_bytes=element_bytes,
    )
    return Cost(2 * rows * heads * dim * products, 2 * forward.bytes)
