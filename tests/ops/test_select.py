"""Selection against sorting by (score, index)."""

import random

import pytest
import torch

from landmark.ops.select import select_top


def by_sorting(scores, k):
    order = sorted((index for index, each in enumerate(scores) if each > -float("inf")), key=lambda i: (-scores[i], i))
    return sorted(order[:k])


@pytest.mark.parametrize("seed", range(30))
def test_ties_go_to_the_lower_index(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    count, k = rng.randint(1, 40), rng.randint(1, 45)
    scores = torch.randint(-2, rng.choice([0, 3, 50]), (3, 4, count)).float()
    scores[torch.rand(scores.shape) < rng.choice([0, 0.3, 0.9])] = -torch.inf
    indices, valid = select_top(scores, k)
    assert indices.shape == valid.shape == (3, 4, min(k, count))
    for row, kept, is_valid in zip(scores.view(-1, count), indices.flatten(0, 1), valid.flatten(0, 1), strict=True):
        expected = by_sorting(row.tolist(), k)
        assert kept.tolist() == expected + [0] * (min(k, count) - len(expected))
        assert is_valid.tolist() == [place < len(expected) for place in range(min(k, count))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_many_candidates_that_all_tie(dtype):
    scores = torch.zeros(2, 16384, dtype=dtype)
    scores[0, 9000], scores[1, :3] = 1.0, -torch.inf
    indices, valid = select_top(scores, 4)
    assert indices.tolist() == [[0, 1, 2, 9000], [3, 4, 5, 6]] and valid.all()


def test_nan_and_infinity():
    scores = torch.tensor([float("nan"), 1.0, float("inf"), 0.0, -float("inf")])
    assert select_top(scores, 2)[0].tolist() == [1, 2]
    indices, valid = select_top(scores, 5)
    assert indices.tolist() == [1, 2, 3, 0, 0] and valid.tolist() == [True, True, True, False, False]


def test_no_candidates():
    indices, valid = select_top(torch.zeros(2, 3, 0), 4)
    assert indices.shape == valid.shape == (2, 3, 0)
    assert not select_top(torch.full((2, 3), -torch.inf), 2)[1].any()
