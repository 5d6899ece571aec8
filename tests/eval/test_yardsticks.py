"""Yardsticks select what they say, against loops over what the memory holds."""

import pytest
import torch

import models
from landmark import LandmarkCache
from landmark.config import LandmarkConfig
from landmark.eval import passkey
from landmark.eval.yardsticks import register

SIZE = 4
TOP_K = 2
TEXT = models.text(90)[None]


class Heard:
    """Keeps what each layer has attended with."""

    def __init__(self):
        self.calls = []

    def __call__(self, memory, query, geometry, scale):
        self.calls.append((memory, query, scale))


def retrievals(granularity, tier="device"):
    register()
    settings = LandmarkConfig(
        block_size=SIZE, top_k=TOP_K, local_blocks=1, chunk_tokens=600, granularity=granularity
    )
    model = models.landmark_model("llama", settings)
    cache = LandmarkCache(model.config, tier)
    cache.record = True
    cache.observer = Heard()
    with torch.no_grad():
        model(TEXT, past_key_values=cache)
    return cache


def queries(cache):
    """Yields (retrieval, memory, query, scale, column, candidates) of some queries of layer 1."""
    retrieval = cache.retrievals[1]
    memory, query, scale = cache.observer.calls[1]
    for column, slot in enumerate(retrieval.positions[0].tolist()):
        candidates = slot // SIZE - 1
        if candidates > TOP_K and column % 7 == 0:
            yield retrieval, memory, query, scale, column, candidates


def old_scores(memory, query, scale, column, head, keys):
    """Scores of keys ``(..., D)``, kept rotated by their offset, at the start of the prefix."""
    rotary = memory.tables.rotary
    slot = column % SIZE
    at = torch.tensor((TOP_K + 1 + 1) * SIZE + slot)
    rotated = rotary.rotation(at, torch.float64).rotate(query[0, head, column])
    return scale * keys @ rotated


@pytest.mark.parametrize("kind", ["block_mass", "mean_key"])
@pytest.mark.parametrize("tier", ["device", "host"])
def test_by_the_keys_of_the_text(kind, tier):
    """Old blocks by their scores at the start of the prefix; recent ones are compared in place."""
    cache = retrievals(kind, tier)
    compared = 0
    for retrieval, memory, query, scale, column, candidates in queries(cache):
        if candidates <= 2 * TOP_K:
            continue
        for head in range(query.shape[1]):
            group = head // 2
            merits = []
            for block in range(candidates - TOP_K):  # the latest are scored at their distances
                numbers = torch.tensor([group]), torch.tensor([block])
                keys, _ = memory.store.pool.gather(*numbers)
                text = keys[0, :-1].double()
                if kind == "mean_key":
                    text = text.mean(0, keepdim=True)
                found = old_scores(memory, query, scale, column, head, text)
                merits.append(found.logsumexp(0))
            order = torch.stack(merits).argsort(descending=True).tolist()
            chosen = set(retrieval.blocks[0, head, column].tolist())
            old = sorted(chosen & set(range(candidates - TOP_K)), key=order.index)
            assert old == order[: len(old)]
            compared += len(old)
    assert compared > 20


def test_the_latest():
    for retrieval, *_, column, candidates in queries(retrievals("latest")):
        for blocks in retrieval.blocks[0, :, column].tolist():
            assert sorted(blocks) == [candidates - 2, candidates - 1]


def test_at_random():
    cache = retrievals("random")
    again = retrievals("random")
    seen = set()
    for retrieval, *_, column, candidates in queries(cache):
        for blocks in retrieval.blocks[0, :, column].tolist():
            assert len(set(blocks)) == TOP_K and min(blocks) >= 0 and max(blocks) < candidates
            seen.add(tuple(sorted(blocks)))
    assert len(seen) > 30
    for one, other in zip(cache.retrievals, again.retrievals, strict=True):
        assert torch.equal(one.blocks, other.blocks)


def test_they_are_measured_like_other_selections(marked):
    kinds = ("token_head", "block_mass", "random")
    task = passkey.PasskeyTask(lengths=(200,), trials=2, granularity=kinds)
    rows = passkey.run([marked], task, lambda row: None)
    assert [row.granularity for row in rows] == list(kinds)
    assert marked.model.landmark.granularity == "token_head"
