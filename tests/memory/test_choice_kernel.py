"""Tests the selection of the decode kernels, alone, against a stable sort.

It runs through Triton's interpreter, or on a GPU.
"""

import random

import pytest
import torch

from landmark.ops.triton.configs import kept_of

pytest.importorskip("triton")
decode = pytest.importorskip("landmark.memory.triton.decode")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
CHUNK = decode.CHUNK.value
NONE = float("-inf")


def sorted_selection(scores, top_k):
    """Returns of scores (Q, n), by index, the indices (Q, top_k) of the best, ascending, -1 for
    none.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    order = torch.where(scores.gather(1, order) > NONE, order, scores.shape[1]).sort(dim=-1).values
    order = torch.where(order == scores.shape[1], -1, order)
    return torch.nn.functional.pad(order, (0, top_k - order.shape[1]), value=-1).int()


def selected(scores, n_recent, top_k, peaks, n_spare=2):
    """Returns what ``sorted_selection`` returns, by the kernel.

    The last ``n_recent`` scores are those of the latest candidates. Of ``n_spare`` chunks behind,
    and of their peaks, nothing may be read.
    """
    queries = len(scores)
    padded_k = kept_of(top_k)
    old = scores[:, : scores.shape[1] - n_recent]
    recent = scores[:, scores.shape[1] - n_recent :]
    used = -(-old.shape[1] // CHUNK)
    spare = torch.full((queries, n_spare), 1e30)
    whole = torch.nn.functional.pad(old, (0, used * CHUNK - old.shape[1]), value=NONE)
    tops = torch.cat((whole.view(queries, used, CHUNK).amax(dim=-1), spare), dim=1)
    whole = torch.cat((whole, spare.repeat_interleave(CHUNK, dim=1)), dim=1)
    recent = torch.nn.functional.pad(recent, (0, padded_k - n_recent), value=NONE)
    first = torch.tensor([scores.shape[1]])
    out = torch.full((queries, top_k), -7, dtype=torch.int32, device=DEVICE)
    decode.top_k_kernel[(queries,)](
        p_score=whole.contiguous().to(DEVICE),
        p_peak=tops.contiguous().to(DEVICE),
        p_recent=recent.contiguous().to(DEVICE),
        p_first=first.to(DEVICE),
        p_selected=out,
        groups=1,
        repeats=1,
        n_width=queries,
        n_index=(used + n_spare) * CHUNK,
        n_chunks=used + n_spare,
        first_kept=1,
        TOP_K=top_k,
        PADDED_K=padded_k,
        N_RECENT=n_recent,
        PEAKS=peaks,
        num_warps=4,
    )
    return out.cpu()


def few(rng, noise, shape):
    """Scores of few values, so that many are equal."""
    return torch.randint(0, rng.choice([1, 2, 3, 40]), shape, generator=noise).float() - 1


def rare(rng, noise, shape):
    """Mostly no candidates."""
    return torch.where(torch.rand(shape, generator=noise) < rng.choice([0, 0.002, 0.02]), 1.0, NONE)


def first_alone(rng, noise, shape):
    """What ``max_blocks=0`` leaves."""
    return torch.where(torch.arange(shape[1]) == 0, torch.randn(shape, generator=noise), NONE)


def wide(rng, noise, shape):
    """All of float32, zeros of both signs with it."""
    bits = torch.randint(-(2**31), 2**31 - 1, shape, generator=noise).int().view(torch.float32)
    return torch.where(bits.isnan(), rng.choice([0.0, -0.0, float("inf")]), bits)


def equal_zeros(rng, noise, shape):
    return torch.where(torch.rand(shape, generator=noise) < 0.5, 0.0, -0.0)


def crowded(rng, noise, shape):
    """The best are neighbours."""
    scores = torch.randn(shape, generator=noise)
    begin = rng.randrange(shape[1])
    scores[:, begin : begin + 20] += 10
    return scores


def ascending(rng, noise, shape):
    """Each chunk is better than all before it, down to the last bits."""
    return (torch.arange(shape[1]) + 2**23).float().expand(shape) * rng.choice([1, -1])


def usual(rng, noise, shape):
    return torch.randn(shape, generator=noise)


@pytest.mark.parametrize("n_old", [1, 30, 5 * CHUNK + 1, 21 * CHUNK - 3])
@pytest.mark.parametrize("top_k", [1, 3, 4, 16])
@pytest.mark.parametrize(
    "kind", [usual, few, rare, first_alone, wide, equal_zeros, crowded, ascending]
)
def test_selection_is_that_of_a_stable_sort(kind, top_k, n_old):
    """With all chunks looked at, with one round of peaks, and with several; with and without latest
    candidates.
    """
    rng = random.Random(f"{kind.__name__} {top_k} {n_old}")
    noise = torch.Generator().manual_seed(rng.randrange(2**31))
    padded_k = kept_of(top_k)
    used = -(-n_old // CHUNK)
    fits = [
        each for each in (padded_k, 2 * padded_k, 64) if each > padded_k or used + 2 <= padded_k
    ]
    for peaks in fits:
        n_recent = rng.choice([0, top_k])
        scores = kind(rng, noise, (3, n_old + n_recent))
        found = selected(scores, n_recent, top_k, peaks)
        assert torch.equal(found, sorted_selection(scores, top_k)), (peaks, n_recent)


def test_nothing_stored_is_selected_from():
    """A memory with no old block, and with none at all."""
    for scores in (torch.randn(2, 4), torch.full((2, 4), NONE)):
        assert torch.equal(selected(scores, 4, 4, 8), sorted_selection(scores, 4))
