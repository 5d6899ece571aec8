"""Top-k against sorting by (score, index)."""

import random

import pytest
import torch

from landmark.ops.select import running_top_k, select_top, with_forced


def by_sorting(scores, k):
    order = sorted(
        (index for index, each in enumerate(scores) if each > -float("inf")),
        key=lambda i: (-scores[i], i),
    )
    return sorted(order[:k])


@pytest.mark.parametrize("seed", range(30))
def test_ties_go_to_the_lower_index(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    count = rng.randint(1, 40)
    k = rng.randint(1, 45)
    scores = torch.randint(-2, rng.choice([0, 3, 50]), (3, 4, count)).float()
    scores[torch.rand(scores.shape) < rng.choice([0, 0.3, 0.9])] = -torch.inf
    indices, valid = select_top(scores, k)
    assert indices.shape == valid.shape == (3, 4, min(k, count))
    for row, kept, is_valid in zip(
        scores.view(-1, count), indices.flatten(0, 1), valid.flatten(0, 1), strict=True
    ):
        expected = by_sorting(row.tolist(), k)
        assert kept.tolist() == expected + [0] * (min(k, count) - len(expected))
        assert is_valid.tolist() == [rank < len(expected) for rank in range(min(k, count))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_many_candidates_that_all_tie(dtype):
    scores = torch.zeros(2, 16384, dtype=dtype)
    scores[0, 9000] = 1.0
    scores[1, :3] = -torch.inf
    indices, valid = select_top(scores, 4)
    assert indices.tolist() == [[0, 1, 2, 9000], [3, 4, 5, 6]] and valid.all()


def test_nan_and_infinity():
    scores = torch.tensor([float("nan"), 1.0, float("inf"), 0.0, -float("inf")])
    assert select_top(scores, 2)[0].tolist() == [1, 2]
    indices, valid = select_top(scores, 5)
    assert indices.tolist() == [1, 2, 3, 0, 0] and valid.tolist() == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_no_candidates():
    indices, valid = select_top(torch.zeros(2, 3, 0), 4)
    assert indices.shape == valid.shape == (2, 3, 0)
    assert not select_top(torch.full((2, 3), -torch.inf), 2)[1].any()


@pytest.mark.parametrize("seed", range(40))
def test_the_running_selection_is_that_of_all_at_once(seed):
    """Few values, so that most selections tie across parts that are scored one after the other."""
    random = torch.Generator().manual_seed(seed)
    count, k, at_once = (int(torch.randint(1, most, (), generator=random)) for most in (30, 6, 8))
    scores = torch.randint(-1, 3, (4, count), generator=random).double()
    scores = scores.masked_fill(scores < 0, -torch.inf)
    best, indices, valid = running_top_k(lambda begin, end: scores[:, begin:end], count, k, at_once)
    for row in range(len(scores)):
        there = [index for index in range(count) if scores[row, index] > -torch.inf]
        ranked = sorted(sorted(there, key=lambda index: (-scores[row, index], index))[:k])
        assert indices[row, valid[row]].tolist() == ranked
        assert best[row, valid[row]].tolist() == scores[row, ranked].tolist()
        assert (best[row, ~valid[row]] == -torch.inf).all()
    assert indices.shape[-1] == min(k, count)


@pytest.mark.parametrize("seed", range(20))
def test_forced_blocks_take_the_place_of_the_last_selected(seed):
    rng = random.Random(seed)
    blocks = rng.randint(1, 12)
    most = rng.randint(1, 6)
    rows = []
    for _ in range(2 * 3 * 4):
        chosen = rng.sample(range(blocks), min(blocks, rng.randint(0, most)))
        rows.append(chosen + [-1] * (most - len(chosen)))
    selected = torch.tensor(rows, dtype=torch.int32).view(2, 3, 4, most)
    forced = torch.randint(-1, blocks, (2, 4, rng.randint(0, 4)), dtype=torch.int32)
    found = with_forced(selected, forced)
    assert found.shape == selected.shape
    assert found.dtype == torch.int32 and found.is_contiguous()
    for row, head, query in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
        wanted = sorted({each for each in forced[row, query].tolist() if each >= 0})
        others = [each for each in selected[row, head, query].tolist() if each >= 0]
        kept = (wanted + [each for each in others if each not in wanted])[:most]
        assert found[row, head, query].tolist() == kept + [-1] * (most - len(kept))
