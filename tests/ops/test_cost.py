"""Costs from shapes against counting one pair at a time."""

import pytest

from landmark.ops.cost import Cost, backward_cost, forward_cost, visible_pairs


def by_hand(queries, keys, block_size, top_k, start):
    own = 0
    landmarks = 0
    past = 0
    for query in range(start, start + queries):
        finished = [each for each in range(keys // block_size) if each < query // block_size]
        landmarks += len(finished)
        kept = finished if top_k is None else finished[:top_k]
        for key in range(keys):
            text = key % block_size != block_size - 1
            own += text and key // block_size == query // block_size and key <= query
            past += text and key // block_size in kept
    return own, landmarks, past


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize(
    ("queries", "keys", "start"), [(40, 40, 0), (7, 40, 33), (5, 30, 30), (6, 30, 50), (9, 30, 25)]
)
def test_visible_pairs(queries, keys, start, top_k):
    found = visible_pairs(queries, keys, block_size=8, top_k=top_k, query_start=start)
    assert found == by_hand(queries, keys, 8, top_k, start)


def test_long_texts_approach_dense_causal_attention():
    cost = forward_cost(1, 16, 16, 4096, 4096, 128, block_size=64)
    dense = 4 * 16 * 4096 * 4096 * 128 / 2
    assert 0.95 * dense < cost.flops < dense
    assert backward_cost(
        1, 16, 16, 4096, 4096, 128, block_size=64
    ).flops / cost.flops == pytest.approx(2.5, abs=0.01)


def test_one_decoded_token_by_hand():
    """2 heads on one key/value head read 8 landmarks and 2 * 3 text tokens.

    There are 8 finished blocks of 4, and no own key.
    """
    cost = forward_cost(1, 2, 1, 1, 32, 10, block_size=4, top_k=2, query_start=32)
    assert cost == Cost(flops=2 * 2 * 10 * (2 * 6 + 8), bytes=2 * 10 * (2 * 2 + 8 + 2 * 12) + 4 * 2)
