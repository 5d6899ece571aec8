"""Every implementation against the definition: the loop, then the reference."""

import itertools

import pytest
import torch

from landmark import landmark_attention
from numerics import EXACT, REORDERED, assert_close
from ops.cases import IMPLS, assert_same, random_call, random_tiles, results
from ops.loop import loop_attention

FAST = 40
FULL = 400


def run(impl):
    def attention(query, key, value, **options):
        return landmark_attention(query, key, value, impl=impl, return_lse=True, **options)

    return attention


def compare(seed, monkeypatch):
    query, key, value, options = random_call(seed)
    random_tiles(monkeypatch, seed)
    loop = results(loop_attention, query, key, value, options)
    reference = results(run("reference"), query, key, value, options)
    assert_same(reference, loop, EXACT, "reference against the loop:")
    assert_same(
        results(run("chunked"), query, key, value, options), reference, REORDERED, "chunked:"
    )


@pytest.mark.parametrize("seed", range(FAST))
def test_equals_the_loop(seed, monkeypatch):
    compare(seed, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(FAST, FULL))
def test_equals_the_loop_full(seed, monkeypatch):
    compare(seed, monkeypatch)


def test_the_cases_reach_everything():
    calls = [random_call(seed) for seed in range(FULL)]
    for name in ("starts", "segments", "landmarks", "query_start", "top_k", "scale", "forced"):
        assert sum(name in options for *_, options in calls) > FULL // 10, name
    assert any(key.shape[2] % options["block_size"] for _, key, _, options in calls)
    assert any(key.shape[1] < query.shape[1] for query, key, _, _ in calls)
    assert {2, 130} <= {options["block_size"] for *_, options in calls}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(8))
def test_gradcheck(impl, seed, monkeypatch):
    query, key, value, options = random_call(1000 + seed)
    random_tiles(monkeypatch, seed)
    leaves = [each.requires_grad_() for each in (query / query.std(), key, value)]

    def function(query, key, value):
        out, lse = run(impl)(query, key, value, **options)
        return out, torch.where(lse > -torch.inf, lse, 0.0)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cuts", [(8,), (24,), (25,), (27,), (8, 16, 26)])
def test_parts_merge_by_their_log_sum_exp(impl, cuts):
    """Cuts lie at block borders, or anywhere inside the queries' own block.

    The gradients are those of the whole, too.
    """
    torch.manual_seed(sum(cuts))
    block_size = 8
    length = 29
    start = 27
    query = torch.randn(2, 4, length - start, 5, dtype=torch.float64)
    key, value = (torch.randn(2, 2, length, 5, dtype=torch.float64) for _ in range(2))
    landmarks = (torch.arange(length) % block_size == block_size - 1).expand(2, -1)

    def part(query, key, value, low, high):
        places = {"landmarks": landmarks[:, low:high]} if low % block_size else {}
        key = key[:, :, low:high]
        value = value[:, :, low:high]
        return run(impl)(
            query, key, value, block_size=block_size, query_start=start - low, **places
        )

    def merged(query, key, value):
        ends = itertools.pairwise((0, *cuts, length))
        outs, sums = zip(*(part(query, key, value, *each) for each in ends), strict=True)
        lse = torch.stack(sums).logsumexp(0)
        return ((torch.stack(sums) - lse).exp()[..., None] * torch.stack(outs)).sum(0), lse

    whole = results(run(impl), query, key, value, {"block_size": block_size})
    assert_same(results(merged, query, key, value, {}), whole, REORDERED)


def test_lse_dtype_and_shape():
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32,) * 2,
        (torch.float64,) * 2,
    ):
        for impl in IMPLS:
            query = torch.randn(2, 4, 3, 8, dtype=dtype)
            key = torch.randn(2, 2, 9, 8, dtype=dtype)
            out, lse = run(impl)(query, key, key, block_size=4)
            assert (out.dtype, lse.dtype, lse.shape) == (dtype, wide, (2, 4, 3))
            assert_close(landmark_attention(query, key, key, block_size=4, impl=impl), out, 0)
