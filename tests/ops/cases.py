"""Random calls of the operation, in float64, from a seed."""

import random

import torch

from landmark.ops import chunked
from numerics import assert_close

IMPLS = ("reference", "chunked")
BLOCK_SIZES = (2, 3, 4, 5, 7, 8, 13, 16, 31, 64, 130)


def random_rows(rng, rows, length):
    """Random ``starts``, ``segments`` and ``landmarks``, each often absent."""
    options = {}
    if rng.random() < 0.4:
        options["starts"] = torch.tensor(
            [rng.choice([0, rng.randint(0, length)]) for _ in range(rows)]
        )
    if rng.random() < 0.3:
        options["segments"] = (torch.rand(rows, length) < rng.choice([0.03, 0.2])).cumsum(1)
    if rng.random() < 0.35:
        options["landmarks"] = torch.rand(rows, length) < rng.choice([0.04, 0.3, 0.8])
        if rng.random() < 0.3:
            options["landmarks"][:, length // 3 :] = False
    return options


def random_call(seed):
    """Query, key, value and options of one call."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = rng.randint(1, 3)
    groups = rng.randint(1, 3)
    dim = rng.choice([1, 2, 3, 5, 8, 16])
    heads = groups * rng.randint(1, 3)
    length = rng.choice([rng.randint(1, 12), rng.randint(13, 90)])
    if rng.random() < 0.05:
        length = 150
    options = {"block_size": rng.choice(BLOCK_SIZES), **random_rows(rng, rows, length)}
    queries = rng.randint(1, min(length, 24))
    if "segments" not in options and rng.random() < 0.5:
        options["query_start"] = rng.choice(
            [rng.randint(0, length), length, length + rng.randint(0, 40)]
        )
        queries = rng.randint(1, 24)
    if rng.random() < 0.5:
        options["top_k"] = rng.randint(1, 5)
    if rng.random() < 0.3:
        options["scale"] = rng.uniform(-1, 2)
    if "top_k" in options and rng.random() < 0.5:
        most = max(1, length // options["block_size"])
        options["forced"] = torch.randint(-1, most + 1, (rows, queries, rng.randint(0, 3)))
    spread = rng.choice([0.5, 2.0, 8.0])
    query = spread * torch.randn(rows, heads, queries, dim, dtype=torch.float64)
    key, value = (torch.randn(rows, groups, length, dim, dtype=torch.float64) for _ in range(2))
    return query, key, value, options


def random_tiles(monkeypatch, seed):
    """Cuts ``chunked`` into other tiles and lets it gather or mask, whatever would be fastest."""
    rng = random.Random(seed)
    monkeypatch.setattr(chunked, "CPU_TILE", rng.choice([1, 100, 2000, 2**20]))
    monkeypatch.setattr(chunked, "TILE_QUERIES", rng.choice([3, 256]))
    monkeypatch.setattr(chunked, "CPU_GATHER", rng.choice([0, 8, 10**9]))


def results(attention, query, key, value, options, seed=0):
    """Output, log-sum-exp and the gradients of a random function of both.

    The function is the same in every dtype.
    """
    leaves = [each.detach().clone().requires_grad_() for each in (query, key, value)]
    out, lse = attention(*leaves, **options)
    weights, lse_weights = random_weights(out, lse, seed)
    total = (out * weights).sum() + torch.where(lse > -torch.inf, lse, 0.0).mul(lse_weights).sum()
    gradients = torch.autograd.grad(total, leaves)
    return dict(
        zip(("out", "lse", "d_query", "d_key", "d_value"), (out, lse, *gradients), strict=True)
    )


def random_weights(out, lse, seed=0):
    """Random weights of output and log-sum-exp, of whose sum ``results`` takes gradients."""
    noise = torch.Generator().manual_seed(seed)
    weights = torch.randn(out.shape, generator=noise).bfloat16().to(out.device, out.dtype)
    return weights, torch.randn(lse.shape, generator=noise).bfloat16().to(out.device, lse.dtype)


def assert_same(actual, expected, budget, what=""):
    for name, each in expected.items():
        assert_close(actual[name], each, budget, f"{what} {name}")
