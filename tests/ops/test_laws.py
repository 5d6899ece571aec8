"""Laws of landmark attention that need no oracle, on every implementation."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from landmark import landmark_attention
from landmark.ops import chunked
from numerics import EXACT, assert_close
from ops.cases import IMPLS

BLOCK = 8


@pytest.fixture(params=[*IMPLS, "chunked, small tiles", "chunked, gathering"])
def attention(request, monkeypatch):
    """Output and log-sum-exp by each implementation.

    ``chunked`` also runs in many tiles, and gathering all selected blocks.
    """
    if request.param.endswith("tiles"):
        monkeypatch.setattr(chunked, "CPU_TILE", 500)
        monkeypatch.setattr(chunked, "CPU_GATHER", 10**9)
    if request.param.endswith("gathering"):
        monkeypatch.setattr(chunked, "CPU_GATHER", 0)
    impl = request.param.split(",")[0]

    def run(query, key, value, block_size=BLOCK, **options):
        return landmark_attention(
            query, key, value, block_size=block_size, impl=impl, return_lse=True, **options
        )

    return run


def tensors(length=45, queries=None, rows=2, heads=4, groups=2, dim=5, seed=0):
    torch.manual_seed(seed)
    query = torch.randn(rows, heads, queries or length, dim, dtype=torch.float64)
    key, value = (torch.randn(rows, groups, length, dim, dtype=torch.float64) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("block_size", [20, 21, 130])
def test_one_block_is_causal_attention_over_its_text(attention, block_size):
    query, key, value = tensors(length=20)
    out, _ = attention(query, key, value, block_size=block_size)
    text = torch.arange(20) != block_size - 1
    visible = torch.ones(20, 20, dtype=torch.bool).tril() & text
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    assert_close(out, expected, EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"starts": torch.tensor([0, 11])},
        {"query_start": 45},
        {"segments": (torch.arange(45) > 9).int().expand(2, -1)},
    ],
)
def test_top_k_of_all_past_blocks_is_no_top_k(attention, options):
    query, key, value = tensors()
    whole = attention(query, key, value, **options)
    for top_k in (5, 6, 100):
        for each, expected in zip(
            attention(query, key, value, top_k=top_k, **options), whole, strict=True
        ):
            assert_close(each, expected, EXACT)


def over_blocks(attention, query, key, value, row, head, slot, kept):
    """Output (D,) and log-sum-exp of one query of 45 slots over some past blocks and its own."""
    own = slot // BLOCK
    slots = [each for each in range(45) if each // BLOCK in (*kept, own)]
    out, lse = attention(
        query[row : row + 1, head : head + 1, slot : slot + 1],
        key[row : row + 1, head // 2 : head // 2 + 1, slots],
        value[row : row + 1, head // 2 : head // 2 + 1, slots],
        query_start=BLOCK * len(kept) + slot % BLOCK,
    )
    return out[0, 0, 0], lse[0, 0, 0]


def test_top_k_keeps_the_blocks_of_highest_landmark_score(attention):
    query, key, value = tensors()
    out, lse = attention(query, key, value, top_k=2)
    for row, head, slot in ((0, 0, 44), (1, 3, 31), (0, 2, 23), (1, 1, 17)):
        own = slot // BLOCK
        scores = key[row, head // 2, BLOCK - 1 :: BLOCK][:own] @ query[row, head, slot]
        kept = scores.topk(min(2, own)).indices.tolist()
        alone, alone_lse = over_blocks(attention, query, key, value, row, head, slot, kept)
        assert_close(out[row, head, slot], alone, EXACT)
        assert_close(lse[row, head, slot], alone_lse, EXACT)


def test_forced_blocks_are_among_the_top_k(attention):
    """With the lowest score, too: the result is that of a gate over exactly these blocks."""
    query, key, value = tensors()
    row = 1
    head = 3
    slot = 44
    own = slot // BLOCK
    scores = key[row, head // 2, BLOCK - 1 :: BLOCK][:own] @ query[row, head, slot]
    order = scores.argsort(descending=True).tolist()
    for forced, kept in (
        ([order[-1]], [order[-1], order[0]]),
        ([order[0], order[0]], order[:2]),
        ([order[1], -1], order[:2]),
        ([own, 99, -7], order[:2]),
        (order[2:], sorted(order[2:])[:2]),
    ):
        blocks = torch.full((2, query.shape[2], len(forced)), -1)
        blocks[row, slot] = torch.tensor(forced)
        out, lse = attention(query, key, value, top_k=2, forced=blocks)
        alone, alone_lse = over_blocks(attention, query, key, value, row, head, slot, kept)
        assert_close(out[row, head, slot], alone, EXACT)
        assert_close(lse[row, head, slot], alone_lse, EXACT)


def test_forced_blocks_that_were_selected_change_nothing(attention):
    query, key, value = (each[:, :1] for each in tensors())
    scores = query[:, 0] @ key[:, 0, BLOCK - 1 :: BLOCK].mT
    is_past = torch.arange(5) < torch.arange(45)[:, None] // BLOCK
    best = scores.masked_fill(~is_past, -torch.inf).argmax(-1, keepdim=True)
    assert len(best[:, BLOCK:].unique()) > 2
    free = attention(query, key, value, top_k=1)
    for old, new in zip(free, attention(query, key, value, top_k=1, forced=best), strict=True):
        assert torch.equal(old, new)
    out, _ = attention(query, key, value, top_k=1, forced=0 * best)
    moved = (out != free[0]).any(-1)[:, 0]
    assert torch.equal(moved, (best[..., 0] != 0) & is_past.any(-1))


def test_text_of_a_block_not_retrieved_changes_nothing(attention):
    query, key, value = tensors(queries=5)
    before = attention(query, key, value, top_k=2)
    scores = torch.einsum(
        "bgrtd,bgnd->bgrtn", query.unflatten(1, (2, 2)), key[:, :, BLOCK - 1 :: BLOCK]
    )
    kept = scores.topk(2).indices
    for block in range(5):
        slots = slice(block * BLOCK, block * BLOCK + BLOCK - 1)
        other_key = key.clone()
        other_value = value.clone()
        other_key[:, :, slots] += 3
        other_value[:, :, slots] = 1e6
        after = attention(query, other_key, other_value, top_k=2)
        unread = (kept != block).all(-1).flatten(1, 2)
        assert unread.any() and not unread.all()
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[unread], new[unread])
        assert (before[0] != after[0]).any(-1)[~unread].all()


def test_equal_landmark_scores_are_taken_from_the_lower_block(attention):
    """Small integers, so that every implementation finds the same ties."""
    query, key, value = tensors(length=88, queries=3, rows=1, heads=2, groups=1)
    query = query.round()
    key = key.round()
    key[:, :, BLOCK - 1 :: BLOCK] = 1.0
    key[:, :, 3 * BLOCK + BLOCK - 1] = 1.0 + query[0, 0, 0].sign()
    query[:] = query[0, 0, 0]
    out, _ = attention(query, key, value, top_k=3)
    slots = [each for each in range(88) if each // BLOCK in (0, 1, 3, 10)]
    expected, _ = attention(query, key[:, :, slots], value[:, :, slots])
    assert_close(out, expected, EXACT)


def test_a_landmark_gates_but_its_value_is_not_read(attention):
    query, key, value = tensors()
    out, lse = attention(query, key, value)
    other = value.clone()
    other[:, :, BLOCK - 1 :: BLOCK] = 1e9
    assert torch.equal(attention(query, key, other)[0], out)
    moved = key.clone()
    moved[:, :, BLOCK - 1] += 1
    late = slice(BLOCK, None)
    assert (attention(query, moved, value)[1] != lse)[:, :, late].all()
    assert torch.equal(attention(query, moved, value)[0][:, :, :BLOCK], out[:, :, :BLOCK])


def test_weights_sum_to_one(attention):
    query, key, _ = tensors()
    out, _ = attention(query, key, torch.ones_like(key), top_k=3)
    assert_close(out, torch.ones_like(out), EXACT)


def test_nothing_behind_a_query_is_seen(attention):
    query, key, value = tensors()
    out, lse = attention(query, key, value)
    key[:, :, 30:] = 50.0
    value[:, :, 30:] = 1e9
    again, lse_again = attention(query, key, value)
    assert torch.equal(out[:, :, :30], again[:, :, :30]) and torch.equal(
        lse[:, :, :30], lse_again[:, :, :30]
    )
    part, _ = attention(query[:, :, :30], key, value, query_start=0)
    assert_close(part, out[:, :, :30], EXACT)


def test_padding_changes_nothing(attention):
    query, key, value = tensors()
    out, lse = attention(query, key, value)
    for pads in ([3, 0], [BLOCK, 13], [45, 2]):
        width = max(pads)
        padded = [
            torch.full((2, each.shape[1], 45 + width, 5), 7.0, dtype=torch.float64)
            for each in (query, key, value)
        ]
        starts = torch.tensor([width - (width - pad) for pad in pads])
        for row, pad in enumerate(pads):
            for new, old in zip(padded, (query, key, value), strict=True):
                new[row, :, pad : pad + 45] = old[row]
        padded_out, padded_lse = attention(*padded, starts=starts)
        for row, pad in enumerate(pads):
            assert_close(padded_out[row, :, pad : pad + 45], out[row], EXACT)
            assert_close(padded_lse[row, :, pad : pad + 45], lse[row], EXACT)
            assert not padded_out[row, :, :pad].any()
            assert (padded_lse[row, :, :pad] == -torch.inf).all()


def test_packing_changes_nothing(attention):
    query, key, value = tensors(rows=1)
    ends = [0, 9, 10, 33, 45]
    segments = torch.repeat_interleave(torch.tensor([4, 2, 9, 0]), torch.tensor(ends).diff())[None]
    out, lse = attention(query, key, value, segments=segments, top_k=2)
    for low, high in itertools.pairwise(ends):
        part = [each[:, :, low:high] for each in (query, key, value)]
        alone, alone_lse = attention(*part, top_k=2)
        assert_close(out[:, :, low:high], alone, EXACT)
        assert_close(lse[:, :, low:high], alone_lse, EXACT)


def test_batch_order_changes_nothing(attention):
    query, key, value = tensors(rows=4)
    starts = torch.tensor([0, 5, 45, 20])
    order = torch.tensor([2, 0, 3, 1])
    out, lse = attention(query, key, value, starts=starts)
    again, lse_again = attention(query[order], key[order], value[order], starts=starts[order])
    assert_close(again, out[order], EXACT)
    assert_close(lse_again, lse[order], EXACT)


def test_landmarks_at_their_regular_places_are_the_regular_grid(attention):
    query, key, value = tensors()
    landmarks = (torch.arange(45) % BLOCK == BLOCK - 1).expand(2, -1)
    for options in ({}, {"top_k": 2}):
        for each, other in zip(
            attention(query, key, value, **options),
            attention(query, key, value, block_size=3, landmarks=landmarks, **options),
            strict=True,
        ):
            assert_close(other, each, EXACT)


def test_a_block_without_text_takes_no_part(attention):
    query, key, value = tensors(length=20, queries=4)
    landmarks = torch.zeros(2, 20, dtype=torch.bool)
    landmarks[:, [5, 6, 7, 12]] = True
    kept = [each for each in range(20) if each not in (6, 7)]
    key[:, :, 6:8] = 100 * query.mean()
    for options in ({}, {"top_k": 2}):
        out, lse = attention(query, key, value, landmarks=landmarks, **options)
        expected, expected_lse = attention(
            query, key[:, :, kept], value[:, :, kept], landmarks=landmarks[:, kept], **options
        )
        assert_close(out, expected, EXACT)
        assert_close(lse, expected_lse, EXACT)


def test_an_unfinished_block_is_seen_from_inside_only(attention):
    query, key, value = tensors(length=21, queries=4)
    whole, _ = attention(query, key[:, :, :16], value[:, :, :16], query_start=24)
    behind, _ = attention(query, key, value, query_start=24)
    assert_close(behind, whole, EXACT)
    inside, _ = attention(query[:, :, :2], key, value, query_start=21)
    assert (inside != whole[:, :, :2]).any(-1).all()


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_query_that_sees_nothing_gives_zeros(attention, top_k):
    query, key, value = (each.requires_grad_() for each in tensors(length=10))
    out, lse = attention(query, key, value, starts=torch.tensor([10, 4]), top_k=top_k)
    assert not out[0].any() and not out[1, :, :4].any() and out[1, :, 4:].all()
    assert (lse[0] == -torch.inf).all() and lse[1, :, 4:].isfinite().all()
    gradients = torch.autograd.grad(out.sum() + lse.exp().sum(), (query, key, value))
    for each in gradients:
        assert (
            each.isfinite().all()
            and not each[0].any()
            and not each[1, :, :4].any()
            and each[1, :, 4:9].any()
        )


def test_no_keys_and_no_queries(attention):
    query, key, value = (each.requires_grad_() for each in tensors(length=10))
    out, lse = attention(query, key[:, :, :0], value[:, :, :0], query_start=0)
    out.sum().backward()
    assert not out.any() and (lse == -torch.inf).all() and not query.grad.any()
    out, lse = attention(query[:, :, :0], key, value)
    assert out.shape == (2, 4, 0, 5) and lse.shape == (2, 4, 0)


def test_autocast_runs_in_its_dtype(attention):
    query, key, value = (each.float().requires_grad_() for each in tensors())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attention(query, key.bfloat16(), value)
    expected, _ = attention(*(each.bfloat16() for each in (query, key, value)))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, expected)
    out.sum().backward()
    assert query.grad.dtype == torch.float32
